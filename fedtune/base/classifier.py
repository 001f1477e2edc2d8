"""A text classifier: a Hugging Face encoder, pooled token states, one linear layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedtune.base.loading import (
    first_line,
    load_config,
    load_frozen,
    load_tokenizer,
    longest_text,
    open_base,
    transformers_config,
)
from fedtune.base.resolve import gguf_file
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
        self.name = name
        self.folder, self.digest = open_base(name, expected)
        self.encoder = _load_encoder(self.folder)
        self.config = transformers_config(self.encoder)
        self.parameters = sum(p.numel() for p in self.encoder.parameters())
        self.tokenizer = load_tokenizer(self.folder)

    @property
    def max_tokens(self) -> int:
        """The longest text that the encoder has positions for."""
        return longest_text(self.config)

    def classifier(self, labels: int, pooling: Pooling = "mean") -> EncoderClassifier:
        """A classifier over this encoder with a fresh, seeded-by-the-caller linear layer."""
        return EncoderClassifier(self.encoder, labels, pooling)


def load_classifier(name: str, labels: int, pooling: Pooling = "mean") -> EncoderClassifier:
    """The module that an adapter folder of a run loads onto.

    ``PeftModel.from_pretrained(load_classifier("all-MiniLM-L6-v2", 21), "runs/x/adapter")``
    """
    return BaseModel(name).classifier(labels, pooling)


def outline(folder: Path, labels: int, pooling: Pooling = "mean") -> EncoderClassifier:
    """The classifier without any weights, on the meta device: shapes, and no memory.

    Raises `BaseModelError`.
    """
    from transformers import AutoModel

    try:
        config = load_config(folder)
        with torch.device("meta"):
            encoder = AutoModel.from_config(
                config, trust_remote_code=False, **_without_pooler(config)
            )
            return EncoderClassifier(encoder, labels, pooling).requires_grad_(False)
    except Exception as error:  # transformers raises its own kinds for broken configurations
        raise BaseModelError(
            f"base model {folder}: cannot be understood: {first_line(error)}"
        ) from error


def _load_encoder(folder: Path) -> nn.Module:
    from transformers import AutoModel

    if gguf_file(folder) is not None:
        raise BaseModelError(
            f'base model {folder}: a GGUF file holds a decoder; set base.task = "causal-lm"'
        )
    try:
        config = load_config(folder)
    except Exception as error:  # transformers raises its own kinds for broken configurations
        raise BaseModelError(
            f"base model {folder}: cannot be loaded: {first_line(error)}"
        ) from error
    encoder = load_frozen(AutoModel, folder, config=config, **_without_pooler(config))
    if not hasattr(config, "hidden_size"):
        raise BaseModelError(
            f"base model {folder}: '{config.model_type}' is not a text encoder with a hidden_size"
        )
    return encoder


def _without_pooler(config: Any) -> dict[str, bool]:
    # Half of the supported architectures have a pooling layer that mean pooling never
    # uses; unused parameters would only take memory.
    return {"add_pooling_layer": False} if config.model_type in _WITH_POOLER else {}


_WITH_POOLER = {"bert", "roberta", "xlm-roberta", "camembert", "ernie", "mpnet"}
