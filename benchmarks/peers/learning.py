"""What all peers share: model, padding and an ordinary training loop, one optimizer per client."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from fedtune.base.classifier import EncoderClassifier
from peers.job import ALPHA, MAX_TOKENS, RANK, TARGETS, Job

Batch = tuple[Tensor, Tensor, Tensor]
State = dict[str, Tensor]

logging.disable_progress_bar()
logging.set_verbosity_error()


def load_tokenizer(job: Job) -> Any:
    """The tokenizer of the base model."""
    return AutoTokenizer.from_pretrained(job.base)


def load_model(job: Job) -> nn.Module:
    """The frozen base with a fresh adapter."""
    encoder = AutoModel.from_pretrained(job.base, add_pooling_layer=False)
    lora = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=list(TARGETS),
        modules_to_save=["classifier"],
    )
    return get_peft_model(EncoderClassifier(encoder, job.labels), lora)


def initial_state(job: Job) -> State:
    """The adapter before round 1."""
    return load_file(job.initial)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by the names under which peft saves them."""
    return {
        name.replace(".modules_to_save", "").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def get_state(model: nn.Module) -> State:
    """A copy of the adapter."""
    return {name: p.detach().clone() for name, p in trainable(model).items()}


def set_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Overwrite the adapter."""
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.copy_(state[name])


@dataclass(frozen=True)
class Corpus:
    """One client's tokenized texts."""

    ids: list[list[int]]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per text."""
        return np.array([len(row) for row in self.ids], np.int64)

    def batch(self, rows: NDArray[np.int64], width: int | None = None) -> Batch:
        """Ids, mask and labels, padded to `width` or to the longest text of the batch."""
        texts = [self.ids[row] for row in rows]
        width = width or max(map(len, texts))
        ids = torch.zeros(len(texts), width, dtype=torch.long)
        mask = torch.zeros(len(texts), width, dtype=torch.long)
        for place, text in enumerate(texts):
            ids[place, : len(text)] = torch.tensor(text)
            mask[place, : len(text)] = 1
        return ids, mask, torch.tensor([self.labels[row] for row in rows])


def load_corpus(job: Job, client: str, tokenizer: Any) -> Corpus:
    """Read and tokenize one client's texts."""
    texts, labels = job.rows_of(client)
    return Corpus(tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"], labels)


def train(model: nn.Module, batches: Iterable[Batch], lr: float) -> None:
    """One step per batch."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.0)
    for ids, mask, labels in batches:
        loss = nn.functional.cross_entropy(model(ids, mask), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
