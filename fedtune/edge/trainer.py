"""Training on a device: the `Trainer` of clients that have ONNX Runtime and no PyTorch."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtune.edge.optimizer import Moments, Optimizer, clip_norm, make_optimizer
from fedtune.errors import TrainingError
from fedtune.train.private import RecordPrivacy, private_gradient
from fedtune.train.trainer import Dataset, Evaluation, LocalPlan, LocalResult
from fedtune.types import Float32Vector, Manifest

ALL_ROWS = 1 << 16  # more than a batch has


@dataclass(frozen=True)
class EdgeSettings:
    """What does not change from round to round; `micro_batch` rows at most go through at once."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    record_privacy: RecordPrivacy | None = None
    micro_batch: int = ALL_ROWS


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


class Differentiable(Protocol):
    """A frozen model and its task, by the adapter in front of or inside of it."""

    @property
    def base_digest(self) -> str: ...

    def reseed(self, seed: int) -> None:
        """Begin the stream of dropout masks that belongs to `seed`."""

    def gradient(
        self, adapter: Float32Vector, data: Dataset, rows: NDArray[np.int64]
    ) -> tuple[float, Float32Vector]:
        """The mean loss of these rows, and its gradient by the adapter, float32 `[size]`."""

    def evaluate(self, adapter: Float32Vector, data: Dataset) -> Evaluation:
        """Evaluate `adapter` on all rows of `data`."""


class EdgeTrainer:
    """Trains an adapter by the gradients of a `Differentiable`, with torch's arithmetic."""

    def __init__(
        self,
        manifest: Manifest,
        model: Differentiable,
        settings: EdgeSettings,
        moments: MomentStore | None = None,
    ) -> None:
        self._manifest, self._model = manifest, model
        self._settings = settings
        self._moments = moments or FreshMoments()

    @property
    def manifest(self) -> Manifest:
        """The adapter's tensors."""
        return self._manifest

    @property
    def base_digest(self) -> str:
        """SHA-256 of all that is frozen."""
        return self._model.base_digest

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
        if settings.record_privacy is None:
            loss, fisher = self._descend(trained, optimizer, data, plan)
        else:
            self._descend_privately(trained, optimizer, data, plan, settings.record_privacy)
        if not (loss is None or math.isfinite(loss)) or not np.isfinite(trained).all():
            advice = " or set train.max-grad-norm" if settings.record_privacy is None else ""
            raise TrainingError(
                f"the loss or the adapter is no longer finite; lower train.lr{advice}"
            )
        self._moments.save(moments)
        return LocalResult(trained, loss, time.perf_counter() - started, fisher)

    def evaluate(self, adapter: Float32Vector, data: Dataset) -> Evaluation:
        """See `Differentiable.evaluate`."""
        return self._model.evaluate(adapter, data)

    def _descend(
        self,
        trained: Float32Vector,
        optimizer: Optimizer,
        data: Dataset,
        plan: LocalPlan,
    ) -> tuple[float, Float32Vector | None]:
        self._model.reseed(plan.seed)
        losses = []
        squares = np.zeros_like(trained) if plan.fisher else None
        received = trained.copy() if plan.proximal else None
        for rows, lr in zip(plan.batches, plan.learning_rates, strict=True):
            loss, gradient = self._model.gradient(trained, data, rows)
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

    def _descend_privately(
        self,
        trained: Float32Vector,
        optimizer: Optimizer,
        data: Dataset,
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
            return self._model.gradient(trained, data, np.array([row]))[1]

        for lr in plan.learning_rates:
            found = private_gradient(
                gradient, trained.size, len(data), plan.batch_size, privacy, random
            )
            optimizer.step(trained, found, lr)
