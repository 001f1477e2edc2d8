"""A text classifier: a Hugging Face encoder, pooled token states, one linear layer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

# Tokenizing is quick and its threads do not survive the fork that shares the base model.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor, nn

from fedtune.base.resolve import digest_base, resolve_base
from fedtune.errors import BaseModelError

Pooling = Literal["mean", "cls"]


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero: it prefers no label before it has seen one."""

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class EncoderClassifier(nn.Module):
    """Logits `[batch, labels]` from token ids and mask, both `[batch, tokens]`.

    Mean pooling is what sentence encoders are trained with (Reimers and Gurevych 2019), so
    their features are linearly separable from the first step.
    """

    config: Any  # peft reads the architecture's name from it

    def __init__(self, encoder: nn.Module, labels: int, pooling: Pooling = "mean") -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        self.pooling = pooling
        self.classifier = ZeroLinear(int(self.config.hidden_size), labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Class logits, float32 `[batch, labels]`."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        if self.pooling == "cls":
            pooled = states[:, 0]
        else:
            mask = attention_mask.unsqueeze(-1).to(states.dtype)
            pooled = (states * mask).sum(1) / mask.sum(1)
        logits: Tensor = self.classifier(pooled)
        return logits.float()


class BaseModel:
    """A frozen encoder with its tokenizer and digest, loaded once per process."""

    def __init__(self, name: str, expected: str | None = None) -> None:
        """Load `name` (see `resolve_base`), whose digest must be `expected`, if that is given.

        Raises `BaseModelError`.
        """
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self.name = name
        self.folder = resolve_base(name)
        self.digest = digest_base(self.folder)
        if expected is not None and self.digest != expected:
            raise BaseModelError(
                f"base model {self.folder}: its digest is {self.digest}, base.digest says "
                f"{expected}; this is another model, or a file of it has changed"
            )
        self.encoder = _load_encoder(self.folder)
        self.encoder.requires_grad_(False)
        self.parameters = sum(p.numel() for p in self.encoder.parameters())
        self.tokenizer = load_tokenizer(self.folder)

    @property
    def max_tokens(self) -> int:
        """The longest text that the encoder has positions for."""
        config: Any = self.encoder.config
        return longest_text(config)

    def classifier(self, labels: int, pooling: Pooling = "mean") -> EncoderClassifier:
        """A classifier over this encoder with a fresh, seeded-by-the-caller linear layer."""
        return EncoderClassifier(self.encoder, labels, pooling)


def load_classifier(name: str, labels: int, pooling: Pooling = "mean") -> EncoderClassifier:
    """The module that an adapter folder of a run loads onto.

    ``PeftModel.from_pretrained(load_classifier("all-MiniLM-L6-v2", 21), "runs/x/adapter")``
    """
    return BaseModel(name).classifier(labels, pooling)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a base model; raises `BaseModelError`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(
            f"base model {folder}: its tokenizer cannot be loaded: {_first_line(error)}"
        ) from error


def longest_text(config: Any) -> int:
    """Tokens of the longest text that an encoder of this configuration has positions for."""
    positions = getattr(config, "max_position_embeddings", None)
    # RoBERTa and its kin start counting positions after the padding id.
    offset = 2 if "roberta" in config.model_type else 0
    return int(positions) - offset if positions else 1 << 20


def outline(folder: Path, labels: int, pooling: Pooling = "mean") -> EncoderClassifier:
    """The classifier without any weights, on the meta device: shapes, and no memory.

    Raises `BaseModelError`.
    """
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            encoder = AutoModel.from_config(
                config, trust_remote_code=False, **_without_pooler(config)
            )
            return EncoderClassifier(encoder, labels, pooling).requires_grad_(False)
    except Exception as error:  # transformers raises its own kinds for broken configurations
        raise BaseModelError(
            f"base model {folder}: cannot be understood: {_first_line(error)}"
        ) from error


def _load_encoder(folder: Path) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        encoder: nn.Module
        encoder, found = AutoModel.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            **_without_pooler(config),
        )
    except Exception as error:  # transformers raises its own kinds for broken configurations
        raise BaseModelError(
            f"base model {folder}: cannot be loaded: {_first_line(error)}"
        ) from error
    if missing := sorted(found["missing_keys"]):
        # They would be drawn at random, differently in each process, and called pretrained.
        raise BaseModelError(
            f"base model {folder}: {len(missing)} weights are missing in the file, "
            f"such as {missing[0]}"
        )
    if not hasattr(encoder.config, "hidden_size"):
        raise BaseModelError(
            f"base model {folder}: '{config.model_type}' is not a text encoder with a hidden_size"
        )
    return encoder


def _without_pooler(config: Any) -> dict[str, bool]:
    # Half of the supported architectures have a pooling layer that mean pooling never
    # uses; unused parameters would only take memory.
    return {"add_pooling_layer": False} if config.model_type in _WITH_POOLER else {}


_WITH_POOLER = {"bert", "roberta", "xlm-roberta", "camembert", "ernie", "mpnet"}


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
