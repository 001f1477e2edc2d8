"""What is learned: how rows become batches, batches a loss, and outputs an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import ConcatDataset, default_collate

from fedtune.base.causal import position_logits
from fedtune.data import TextExamples
from fedtune.train.texts import IGNORED, Batch, TokenizedTexts, ended, padded, with_next_tokens
from fedtune.types import Task as TaskName


class Task(Protocol):
    """A task over rows of one kind of data set."""

    @property
    def evaluated_at_once(self) -> int:
        """Rows of a batch in an evaluation."""

    def batch(self, data: Any, rows: NDArray[np.int64], device: torch.device) -> Any:
        """The rows as whatever `loss` and `outputs` take."""

    def loss(self, module: nn.Module, batch: Any) -> Tensor:
        """Mean training loss of the batch, a scalar."""

    def outputs(self, module: nn.Module, batch: Any) -> Outputs:
        """What the module answers, for evaluation."""


@dataclass(frozen=True)
class Outputs:
    """Summed evaluation loss of a batch; predicted and right classes (int64 `[batch]`).

    Both are None for a task without classes.
    """

    loss_sum: Tensor
    predictions: NDArray[np.int64] | None = None
    labels: NDArray[np.int64] | None = None


def tokenize(
    tokenizer: Any, examples: TextExamples, max_length: int, end_id: int | None = None
) -> TokenizedTexts:
    """Tokenize once what is trained on every round; `tokenizer` is one of transformers'.

    With `end_id`, each text ends with it, see `ended`.
    """
    if not len(examples):
        return TokenizedTexts.of([], examples.labels)
    rows = tokenizer(list(examples.texts), truncation=True, max_length=max_length)["input_ids"]
    if end_id is not None:
        rows = ended(rows, end_id, max_length)
    return TokenizedTexts.of(rows, examples.labels)


class TextClassification:
    """One label per text, cross-entropy, accuracy."""

    evaluated_at_once = 64

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def batch(
        self, data: TokenizedTexts, rows: NDArray[np.int64], device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and mask, int64 `[batch, longest]`, and labels, int64 `[batch]`."""
        return _tensors(padded(data, rows, self._pad_id), device)

    def loss(self, module: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy of the batch."""
        ids, mask, labels = batch
        logits: Tensor = module(ids, mask)
        return functional.cross_entropy(logits, labels)

    def outputs(self, module: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Outputs:
        """Cross-entropy, unadjusted, and the likeliest label of each text."""
        ids, mask, labels = batch
        logits: Tensor = module(ids, mask)
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        return Outputs(loss, logits.argmax(-1).cpu().numpy(), labels.cpu().numpy())


class CausalLanguageModel:
    """Each text's next tokens, cross-entropy, no classes."""

    evaluated_at_once = 8  # the logits of a token are as many as the vocabulary has tokens

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def batch(
        self, data: TokenizedTexts, rows: NDArray[np.int64], device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and mask, int64 `[batch, longest]`, and labels, int64 `[batch · longest]`."""
        return _tensors(with_next_tokens(data, rows, self._pad_id), device)

    def loss(self, module: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy over all tokens of the batch that follow another."""
        ids, mask, labels = batch
        logits = position_logits(module, ids, mask)
        return functional.cross_entropy(logits, labels, ignore_index=IGNORED)

    def outputs(self, module: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Outputs:
        """The sum over texts of each one's mean cross-entropy: every text counts the same."""
        ids, mask, labels = batch
        logits = position_logits(module, ids, mask)
        losses = functional.cross_entropy(
            logits, labels, ignore_index=IGNORED, reduction="none"
        ).view_as(ids)
        return Outputs((losses.sum(1) / (mask.sum(1) - 1)).sum())


TASKS: dict[TaskName, type[TextClassification | CausalLanguageModel]] = {
    "text-classification": TextClassification,
    "causal-lm": CausalLanguageModel,
}


def _tensors(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    ids, mask, labels = (torch.from_numpy(array).to(device) for array in batch)
    return ids, mask, labels


@dataclass(frozen=True)
class Rows:
    """A user's own rows: any sequence, such as a `torch.utils.data.Dataset`."""

    rows: Sequence[Any]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """All the same: nothing is known of the rows."""
        return np.ones(len(self.rows), np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, rows: NDArray[np.int64]) -> Rows:
        """The data set of these rows."""
        return Rows([self.rows[int(row)] for row in rows])

    def concatenate(self, others: Sequence[Rows]) -> Rows:
        """These rows and then those of `others`; nothing is read yet."""
        parts: list[Any] = [self.rows, *(other.rows for other in others)]
        joined: Any = ConcatDataset(parts)  # indexes lazily; any sequence will do
        return Rows(joined)


class CustomTask:
    """A user's own loss over `(inputs, target)` rows collated by torch's `default_collate`.

    `loss(module, batch)` returns the batch's mean loss. If targets are integers and the
    module's output is `[batch, classes]`, accuracy is reported too.
    """

    evaluated_at_once = 64

    def __init__(self, loss: Callable[[nn.Module, Any], Tensor] | None = None) -> None:
        self._loss = loss or _cross_entropy

    def batch(self, data: Rows, rows: NDArray[np.int64], device: torch.device) -> Any:
        """The rows, collated and on the device."""
        return _to(default_collate([data.rows[int(row)] for row in rows]), device)

    def loss(self, module: nn.Module, batch: Any) -> Tensor:
        """The user's loss."""
        return self._loss(module, batch)

    def outputs(self, module: nn.Module, batch: Any) -> Outputs:
        """The user's loss; predicted classes if the module gives `[batch, classes]`."""
        inputs, target = batch[0], batch[-1]
        summed = self._loss(module, batch) * len(target)
        if not _is_class(target):
            return Outputs(summed)
        logits = module(inputs)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            return Outputs(summed)
        return Outputs(summed, logits.argmax(-1).cpu().numpy(), target.cpu().numpy())


def class_targets(rows: Sequence[Any]) -> NDArray[np.int64]:
    """Targets of rows that are in memory and whole numbers, int64 `[n]`; else empty.

    A data set that reads its rows when asked is not read through only to count.
    """
    if not isinstance(rows, list | tuple):
        return np.empty(0, np.int64)
    targets: list[Any] = [row[-1] if isinstance(row, tuple | list) else None for row in rows]
    if not all(isinstance(t, int | np.integer) or _is_class(t) for t in targets):
        return np.empty(0, np.int64)
    return np.array([int(t) for t in targets], np.int64)


def _cross_entropy(module: nn.Module, batch: Any) -> Tensor:
    inputs, target = batch
    return functional.cross_entropy(module(inputs), target)


def _is_class(target: Any) -> bool:
    return (
        isinstance(target, Tensor)
        and not target.dtype.is_floating_point
        and not target.dtype.is_complex
        and target.ndim <= 1
    )


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return tuple(_to(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value
