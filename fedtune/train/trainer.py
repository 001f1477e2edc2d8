"""What a round needs of anything that can train: the `Trainer` protocol and its values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from fedtune.types import Float32Vector, Manifest


@dataclass(frozen=True)
class LocalPlan:
    """Local training of one client in one round.

    `batches` yields row indices of one optimizer step each; a generator, so that a plan of
    many steps takes no memory. `learning_rates` has one value per step. `seed` drives dropout.
    With record-level privacy the client draws its own batches, of `batch_size` examples on
    average, and `batches` and `seed` are not used. `fisher` asks for `LocalResult.fisher`, which
    is not to be had with it, and neither is `proximal`: μ of FedProx (Li et al. 2020, arXiv
    1812.06127), which adds μ times the way from the received adapter to each step's gradient,
    before it is clipped.
    """

    batches: Iterator[NDArray[np.int64]]
    learning_rates: Iterator[float]
    seed: int
    batch_size: int | None = None
    fisher: bool = False
    proximal: float = 0.0


@dataclass(frozen=True)
class LocalResult:
    """The trained adapter (float32, manifest order), mean loss over the steps, seconds.

    `loss` is None with record-level privacy: it comes from the examples without noise, so
    there is none that may leave the client.

    `fisher`, if the plan asks for it, is about the diagonal of the empirical Fisher information
    (float32, manifest order): the mean over the steps of B·g², where g is the gradient of a
    batch's mean loss, before it is clipped, and B its number of examples. With B = 1 that is the
    mean of squared gradients of single examples, which defines it. With more, B·g² is on average
    their mean plus (B - 1) times the square of the mean gradient, which vanishes where training
    has converged; in return it costs no pass of its own. And it is taken along the way that
    training went, not at its end.
    """

    adapter: Float32Vector = field(repr=False)
    loss: float | None
    seconds: float
    fisher: Float32Vector | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Evaluation:
    """What a model did on a test set of `examples` rows.

    `predictions` and `labels` are int64 `[examples]`, in one order; both are empty for a task
    without classes, and `correct` is then 0.
    """

    examples: int
    loss_sum: float
    correct: int
    predictions: NDArray[np.int64]
    labels: NDArray[np.int64]

    @property
    def loss(self) -> float:
        """Mean loss per example."""
        return self.loss_sum / self.examples

    @property
    def accuracy(self) -> float | None:
        """Share of right answers, or None for a task without classes."""
        return self.correct / self.examples if len(self.labels) else None


class Dataset(Protocol):
    """Rows that a trainer prepared; `lengths` (int64 `[n]`) is each row's cost, for bucketing."""

    @property
    def lengths(self) -> NDArray[np.int64]: ...

    def __len__(self) -> int: ...

    def select(self, rows: NDArray[np.int64]) -> Self:
        """The data set of these rows."""

    def concatenate(self, others: Sequence[Self]) -> Self:
        """These rows and then those of `others`."""


class Trainer(Protocol):
    """Trains an adapter on prepared data. One instance serves any number of clients."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def base_digest(self) -> str: ...

    def train(self, adapter: Float32Vector, data: Dataset, plan: LocalPlan) -> LocalResult:
        """Train from `adapter`; raises `TrainingError` when the loss is not finite."""

    def evaluate(self, adapter: Float32Vector, data: Dataset) -> Evaluation:
        """Evaluate `adapter` on all rows of `data`."""
