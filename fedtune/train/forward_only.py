"""Training without gradients: the slope along one direction from two forward passes.

MeZO (Malladi et al. 2023, arXiv 2305.17333, algorithm 1), with SGD. The direction is one of the few
of `train.directions`, so that what was learned is one number per direction.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedtune.config import Config
from fedtune.errors import ConfigError, TrainingError
from fedtune.train.directions import Directions
from fedtune.train.trainer import Dataset, Evaluation, LocalPlan, LocalResult
from fedtune.types import Float32Vector, Manifest


class FrozenModel(Protocol):
    """What is common to the models that are trained without gradients."""

    @property
    def base_digest(self) -> str: ...

    def evaluate(self, adapter: Float32Vector, data: Dataset) -> Evaluation:
        """Evaluate `adapter` on all rows of `data`."""


class LossModel(FrozenModel, Protocol):
    """A frozen model of which the loss at an adapter can be had."""

    def loss(self, adapter: Float32Vector, data: Dataset, rows: NDArray[np.int64]) -> float:
        """The mean loss of these rows, without dropout."""


class SlopeTrainer(ABC):
    """Trains coordinates of `directions`; what it is given and gives back are those."""

    def __init__(self, model: FrozenModel, directions: Directions) -> None:
        self._model, self._directions = model, directions

    @abstractmethod
    def slopes(
        self, here: Float32Vector, numbers: Iterator[int], data: Dataset, rows: NDArray[np.int64]
    ) -> tuple[float, list[tuple[int, float]]]:
        """The loss about `here` (float32 `[d]`), and its slope along some of `numbers`."""

    @property
    def manifest(self) -> Manifest:
        """One tensor, the coordinates."""
        return self._directions.manifest

    @property
    def base_digest(self) -> str:
        """SHA-256 of the base model."""
        return self._model.base_digest

    def train(self, adapter: Float32Vector, data: Dataset, plan: LocalPlan) -> LocalResult:
        """Train from these coordinates by SGD; raises `TrainingError` if a slope is not finite.

        There is no gradient, so no Fisher information either.
        """
        started = time.perf_counter()
        directions = self._directions
        coordinates, losses = adapter.copy(), []
        here = directions.expand(coordinates)
        numbers = passes(directions.count, plan.seed)
        for rows, lr in zip(plan.batches, plan.learning_rates, strict=True):
            loss, slopes = self.slopes(here, numbers, data, rows)
            for number, slope in slopes:
                step = -lr * slope
                if not abs(step) < np.finfo(np.float32).max:  # NaN is not either
                    raise TrainingError("the loss is no longer finite; lower train.lr")
                here = directions.move(here, number, step)
                coordinates[number] += np.float32(step)
            losses.append(loss)
        return LocalResult(coordinates, float(np.mean(losses)), time.perf_counter() - started)

    def evaluate(self, adapter: Float32Vector, data: Dataset) -> Evaluation:
        """Evaluate the adapter at these coordinates."""
        return self._model.evaluate(self._directions.expand(adapter), data)


class ForwardOnlyTrainer(SlopeTrainer):
    """Each step descends along one direction; `LocalResult.loss` is the mean of all passes."""

    def __init__(self, model: LossModel, directions: Directions, perturbation: float) -> None:
        """`perturbation` is how far it goes along a direction, both ways, to find the slope."""
        super().__init__(model, directions)
        self._losses, self._perturbation = model, perturbation

    def slopes(
        self, here: Float32Vector, numbers: Iterator[int], data: Dataset, rows: NDArray[np.int64]
    ) -> tuple[float, list[tuple[int, float]]]:
        """See `SlopeTrainer.slopes`."""
        number, away = next(numbers), self._perturbation
        above, below = (
            self._losses.loss(self._directions.move(here, number, side), data, rows)
            for side in (away, -away)
        )
        return (above + below) / 2, [(number, (above - below) / (2 * away))]


def passes(count: int, seed: int) -> Iterator[int]:
    """All of `count` directions in random order, then again in another, without end."""
    rng = np.random.default_rng(seed)
    while True:
        yield from map(int, rng.permutation(count))


def directions_of(config: Config, adapter: Manifest, start: Float32Vector) -> Directions:
    """In which a federation's training moves the adapter from the seeded `start`, float32 `[d]`.

    Raises `ConfigError` if there are more of them than the adapter has values.
    """
    count = config.train.directions
    if count > adapter.size:
        raise ConfigError(
            f"train.directions = {count} is more than the adapter's {adapter.size} values; lower "
            "it, or use train.method = backprop"
        )
    return Directions(adapter, start, config.seed, count)
