"""Texts on a device: their losses, scores and gradients, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.edge.engines import Engine, feeds
from fedtune.edge.runtime import open_session
from fedtune.train.cross_entropy import cross_entropy
from fedtune.train.texts import COLLATE, IGNORED, Batch, TokenizedTexts
from fedtune.train.trainer import Dataset, Evaluation
from fedtune.types import Float32Vector, Manifest, Task

# Rows of a batch in an evaluation. A language model's logits are many for a single text.
EVALUATED_AT_ONCE: dict[Task, int] = {"text-classification": 64, "causal-lm": 1}


class ForwardModel:
    """The forward graph: logits without gradients, float32.

    They are `[batch, labels]` of a classifier, `[batch · tokens, vocabulary]` of a language model.

    It is opened when it is first asked: most devices only train.
    """

    def __init__(self, graph: Path, manifest: Manifest, threads: int, device: str = "cpu") -> None:
        self._graph, self._manifest = graph, manifest
        self._threads, self._device = threads, device

    @cached_property
    def _session(self) -> Any:
        return open_session(self._graph, self._threads, self._device)

    def logits(self, adapter: Float32Vector, batch: Batch) -> NDArray[np.float32]:
        """What the model says of a batch's texts; raises `ConfigError` if it does not load."""
        (logits,) = self._session.run(["logits"], feeds(batch, adapter, self._manifest))
        found: NDArray[np.float32] = logits
        return found


class EdgeLosses:
    """Losses and scores of a `ForwardModel`; at most `micro_batch` rows go through at once."""

    def __init__(
        self, forward: ForwardModel, base_digest: str, task: Task, pad_id: int, micro_batch: int
    ) -> None:
        self._forward, self._base_digest = forward, base_digest
        self._task, self._pad_id, self._micro_batch = task, pad_id, micro_batch

    @property
    def base_digest(self) -> str:
        """SHA-256 of the base model of which the graph was made."""
        return self._base_digest

    def loss(self, adapter: Float32Vector, data: Dataset, rows: NDArray[np.int64]) -> float:
        """The mean cross-entropy of these rows at `adapter`."""
        texts, total, count = _texts(data), 0.0, 0
        for part in _parts(rows, self._micro_batch):
            batch, _, losses = self._pass(adapter, texts, part)
            total += float(losses.sum())
            count += _labels_that_count(batch)
        return total / count

    def evaluate(self, adapter: Float32Vector, data: Dataset) -> Evaluation:
        """Evaluate in micro-batches of similar length."""
        texts = _texts(data)
        order = np.argsort(texts.lengths, kind="stable")
        loss_sum, classes = 0.0, self._task == "text-classification"
        found: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        for rows in _parts(order, min(EVALUATED_AT_ONCE[self._task], self._micro_batch)):
            batch, logits, losses = self._pass(adapter, texts, rows)
            if classes:
                loss_sum += float(losses.sum())
                found.append(logits.argmax(-1))
            else:  # of each text the mean over its tokens
                followed = (batch.labels != IGNORED).reshape(len(rows), -1).sum(1)
                loss_sum += float((losses.reshape(len(rows), -1).sum(1) / followed).sum())
        # In the order in which they were asked, as a trainer with PyTorch gives them.
        predictions, labels = np.concatenate(found), texts.labels[order[: len(order) * classes]]
        correct = int((predictions == labels).sum())
        return Evaluation(len(texts), loss_sum, correct, predictions, labels)

    def _pass(
        self, adapter: Float32Vector, texts: TokenizedTexts, rows: NDArray[np.int64]
    ) -> tuple[Batch, NDArray[np.float64], NDArray[np.float64]]:
        """A batch of these rows, its logits, and the loss of each label."""
        batch = self._batch(texts, rows)
        logits = self._forward.logits(adapter, batch).astype(np.float64)
        return batch, logits, cross_entropy(logits, batch.labels)

    def _batch(self, texts: TokenizedTexts, rows: NDArray[np.int64]) -> Batch:
        return COLLATE[self._task](texts, rows, self._pad_id)


class TextGradients(EdgeLosses):
    """The gradients too, of an `Engine`: a `Differentiable`."""

    def __init__(
        self,
        engine: Engine,
        forward: ForwardModel,
        base_digest: str,
        task: Task,
        pad_id: int,
        micro_batch: int,
    ) -> None:
        super().__init__(forward, base_digest, task, pad_id, micro_batch)
        self._engine = engine

    def reseed(self, seed: int) -> None:
        """See `Differentiable.reseed`."""
        self._engine.reseed(seed)

    def gradient(
        self, adapter: Float32Vector, data: Dataset, rows: NDArray[np.int64]
    ) -> tuple[float, Float32Vector]:
        """See `Differentiable.gradient`; it is put together of those of micro-batches."""
        texts, loss, gradient = _texts(data), 0.0, np.zeros_like(adapter)
        whole = _labels_that_count(self._batch(texts, rows))
        for part in _parts(rows, self._micro_batch):
            batch = self._batch(texts, part)
            part_loss, part_gradient = self._engine.gradient(adapter, batch)
            share = _labels_that_count(batch) / whole
            loss += share * part_loss
            gradient += np.float32(share) * part_gradient
        return loss, gradient


def _labels_that_count(batch: Batch) -> int:
    return int((batch.labels != IGNORED).sum())


def _texts(data: Dataset) -> TokenizedTexts:
    if not isinstance(data, TokenizedTexts):
        raise TypeError(f"a device trains on texts, not on {type(data).__name__}")
    return data


def _parts(rows: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
