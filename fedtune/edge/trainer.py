"""Training on a device: the `Trainer` of clients that have ONNX Runtime and no PyTorch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtune.edge.engines import Engine, feeds
from fedtune.edge.optimizer import Moments, Optimizer, clip_norm, make_optimizer
from fedtune.edge.runtime import open_session
from fedtune.errors import TrainingError
from fedtune.train.cross_entropy import cross_entropy
from fedtune.train.private import RecordPrivacy, private_gradient
from fedtune.train.texts import COLLATE, IGNORED, Batch, TokenizedTexts
from fedtune.train.trainer import Dataset, Evaluation, LocalPlan, LocalResult
from fedtune.types import Float32Vector, Manifest, Task

# Rows of a batch in an evaluation. A language model's logits are many for a single text.
EVALUATED_AT_ONCE: dict[Task, int] = {"text-classification": 64, "causal-lm": 1}


@dataclass(frozen=True)
class EdgeSettings:
    """What does not change from round to round; `micro_batch` rows at most go through at once."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    record_privacy: RecordPrivacy | None = None
    micro_batch: int = 1 << 16


class MomentStore(Protocol):
    """Keeps an optimizer's moments from round to round."""

    def load(self, size: int) -> Moments:
        """Those of the last round, or zeros."""

    def save(self, moments: Moments) -> None:
        """Keep these for the next round."""


class FreshMoments:
    """Every round begins with zeros."""

    def load(self, size: int) -> Moments:
        """Zeros."""
        return Moments.zeros(size)

    def save(self, moments: Moments) -> None:
        """Forget them."""


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
        batch = COLLATE[self._task](texts, rows, self._pad_id)
        logits = self._forward.logits(adapter, batch).astype(np.float64)
        return batch, logits, cross_entropy(logits, batch.labels)


class EdgeTrainer:
    """Trains an adapter through an `Engine`, micro-batch by micro-batch."""

    def __init__(
        self,
        manifest: Manifest,
        base_digest: str,
        task: Task,
        pad_id: int,
        engine: Engine,
        forward: ForwardModel,
        settings: EdgeSettings,
        moments: MomentStore | None = None,
    ) -> None:
        self._manifest, self._base_digest = manifest, base_digest
        self._task, self._pad_id = task, pad_id
        self._engine = engine
        self._losses = EdgeLosses(forward, base_digest, task, pad_id, settings.micro_batch)
        self._settings = settings
        self._moments = moments or FreshMoments()

    @property
    def manifest(self) -> Manifest:
        """The adapter's tensors."""
        return self._manifest

    @property
    def base_digest(self) -> str:
        """SHA-256 of the base model of which the artifacts were made."""
        return self._base_digest

    def train(self, adapter: Float32Vector, data: Dataset, plan: LocalPlan) -> LocalResult:
        """Train from `adapter`; raises `TrainingError` if a value is no longer finite.

        With record-level privacy the plan's batches and seed are not used (see
        `train.private`), and `loss` is None.
        """
        started = time.perf_counter()
        settings = self._settings
        trained = adapter.copy()
        moments = self._moments.load(trained.size)
        optimizer = make_optimizer(settings.optimizer, settings.weight_decay, moments)
        loss, fisher = None, None
        texts = _texts(data)
        if settings.record_privacy is None:
            loss, fisher = self._descend(trained, optimizer, texts, plan)
        else:
            self._descend_privately(trained, optimizer, texts, plan, settings.record_privacy)
        if not (loss is None or math.isfinite(loss)) or not np.isfinite(trained).all():
            advice = " or set train.max-grad-norm" if settings.record_privacy is None else ""
            raise TrainingError(
                f"the loss or the adapter is no longer finite; lower train.lr{advice}"
            )
        self._moments.save(moments)
        return LocalResult(trained, loss, time.perf_counter() - started, fisher)

    def evaluate(self, adapter: Float32Vector, data: Dataset) -> Evaluation:
        """Evaluate in micro-batches of similar length."""
        return self._losses.evaluate(adapter, data)

    def _batch(self, data: TokenizedTexts, rows: NDArray[np.int64]) -> Batch:
        return COLLATE[self._task](data, rows, self._pad_id)

    def _descend(
        self,
        trained: Float32Vector,
        optimizer: Optimizer,
        data: TokenizedTexts,
        plan: LocalPlan,
    ) -> tuple[float, Float32Vector | None]:
        self._engine.reseed(plan.seed)
        losses = []
        squares = np.zeros_like(trained) if plan.fisher else None
        received = trained.copy() if plan.proximal else None
        for rows, lr in zip(plan.batches, plan.learning_rates, strict=True):
            loss, gradient = self._gradient(trained, data, rows)
            if squares is not None:
                squares += np.float32(len(rows)) * gradient * gradient
            if received is not None:
                gradient += np.float32(plan.proximal) * (trained - received)
            if self._settings.max_grad_norm is not None:
                gradient = clip_norm(gradient, self._settings.max_grad_norm)
            optimizer.step(trained, gradient, lr)
            losses.append(loss)
        fisher = None if squares is None else squares / np.float32(len(losses))
        return float(np.mean(losses)), fisher

    def _gradient(
        self, adapter: Float32Vector, data: TokenizedTexts, rows: NDArray[np.int64]
    ) -> tuple[float, Float32Vector]:
        """Mean loss and gradient of a batch, put together of those of its micro-batches."""
        loss, gradient = 0.0, np.zeros_like(adapter)
        whole = _labels_that_count(self._batch(data, rows))
        for part in _parts(rows, self._settings.micro_batch):
            batch = self._batch(data, part)
            part_loss, part_gradient = self._engine.gradient(adapter, batch)
            share = _labels_that_count(batch) / whole
            loss += share * part_loss
            gradient += np.float32(share) * part_gradient
        return loss, gradient

    def _descend_privately(
        self,
        trained: Float32Vector,
        optimizer: Optimizer,
        data: TokenizedTexts,
        plan: LocalPlan,
        privacy: RecordPrivacy,
    ) -> None:
        if plan.fisher:
            raise ValueError("the Fisher information has no noise")
        if plan.proximal:
            raise ValueError("the proximal term is not built for record-level privacy")
        if plan.batch_size is None:
            raise ValueError("record-level privacy needs the batch size of the plan")
        from fedtune.privacy.randomness import SecureRandom  # cryptography takes 8 MB

        random = SecureRandom()

        def gradient(row: int) -> Float32Vector:
            return self._engine.gradient(trained, self._batch(data, np.array([row])))[1]

        for lr in plan.learning_rates:
            found = private_gradient(
                gradient, trained.size, len(data), plan.batch_size, privacy, random
            )
            optimizer.step(trained, found, lr)


def _labels_that_count(batch: Batch) -> int:
    return int((batch.labels != IGNORED).sum())


def _texts(data: Dataset) -> TokenizedTexts:
    if not isinstance(data, TokenizedTexts):
        raise TypeError(f"a device trains on texts, not on {type(data).__name__}")
    return data


def _parts(rows: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
