"""Training without gradients in front of a cut, where the base model has the gradient.

The server differentiates its half, the client passes its own forward only (the split of HO-SFL):
of the loss L(h(θ)) with h the client's half, ∇L at the cut comes from the server, and the slope
along a direction d is ⟨∇L, (h(θ + εd) - h(θ - εd)) / 2ε⟩. However many directions a step looks
along, it asks the server once; a client needs nothing but inference.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune.adapter.lora import AttachedAdapter
from fedtune.config import Config
from fedtune.train.cut import AcrossCut
from fedtune.train.directions import Directions
from fedtune.train.forward_only import ForwardOnlyTrainer, FrozenModel, SlopeTrainer
from fedtune.train.question_rows import EncodedQuestions
from fedtune.train.questions import QuestionAnswering
from fedtune.train.task import Task
from fedtune.train.torch_trainer import TorchTrainer
from fedtune.train.trainer import Dataset, Evaluation
from fedtune.types import Float32Vector


class CutModel(FrozenModel, Protocol):
    """A client's half, and the base model behind it."""

    def open(self, data: Dataset, rows: NDArray[np.int64]) -> OpenBatch:
        """The batch of these rows, for passes at several adapters."""


class OpenBatch(Protocol):
    """One batch."""

    def embeddings(self, adapter: Float32Vector) -> Tensor:
        """What the client's half makes of it, `[n, longest, width]`; no gradient is kept."""

    def differentiate(self, embeddings: Tensor) -> tuple[float, Tensor]:
        """The mean loss, and its gradient by the embeddings."""


class CutForwardTrainer(SlopeTrainer):
    """Each step descends along `probes` of the directions, at once."""

    def __init__(
        self, model: CutModel, directions: Directions, perturbation: float, probes: int
    ) -> None:
        """`perturbation` is how far it goes along a direction, both ways, to find the slope."""
        super().__init__(model, directions)
        self._opened = model
        self._perturbation, self._probes = perturbation, min(probes, directions.count)

    def slopes(
        self, here: Float32Vector, numbers: Iterator[int], data: Dataset, rows: NDArray[np.int64]
    ) -> tuple[float, list[tuple[int, float]]]:
        """See `SlopeTrainer.slopes`."""
        directions, away = self._directions, self._perturbation
        batch = self._opened.open(data, rows)
        loss, gradient = batch.differentiate(batch.embeddings(here))
        found = []
        for number in islice(numbers, self._probes):
            above, below = (
                batch.embeddings(directions.move(here, number, side)) for side in (away, -away)
            )
            found.append((number, float((gradient * (above - below)).sum()) / (2 * away)))
        return loss, found


class TorchCutModel:
    """A client's half in torch, in inference mode only."""

    def __init__(
        self, trainer: TorchTrainer, adapter: AttachedAdapter, task: QuestionAnswering
    ) -> None:
        """`trainer` is of this adapter and task; raises `ValueError` if there is no cut."""
        if not isinstance(task.behind, AcrossCut):
            raise ValueError("the base model is not behind a cut")
        self._trainer, self._adapter, self._task = trainer, adapter, task
        self._behind = task.behind

    @property
    def base_digest(self) -> str:
        """See `CutModel.base_digest`."""
        return self._trainer.base_digest

    def evaluate(self, adapter: Float32Vector, data: Dataset) -> Evaluation:
        """See `CutModel.evaluate`."""
        return self._trainer.evaluate(adapter, data)

    def open(self, data: Dataset, rows: NDArray[np.int64]) -> OpenBatch:
        """See `CutModel.open`."""
        if not isinstance(data, EncodedQuestions):
            raise TypeError("not questions")
        prompt, labels = self._task.batch(data, rows, self._trainer.device)
        adapter, behind = self._adapter, self._behind
        adapter.module.eval()
        lengths: list[Tensor] = []

        class Opened:
            def embeddings(self, vector: Float32Vector) -> Tensor:
                adapter.write(vector)
                with torch.inference_mode():
                    outputs: tuple[Tensor, Tensor] = adapter.module(prompt)
                found, counts = outputs
                lengths[:] = [counts]
                return found

            def differentiate(self, embeddings: Tensor) -> tuple[float, Tensor]:
                return behind.differentiate(embeddings, lengths[0], labels)

        return Opened()


def forward_trainer(
    config: Config,
    trainer: TorchTrainer,
    adapter: AttachedAdapter,
    task: Task,
    directions: Directions,
) -> ForwardOnlyTrainer | CutForwardTrainer:
    """What trains without gradients, by where the base model is."""
    away = config.train.perturbation
    if config.slopes_at_the_cut and isinstance(task, QuestionAnswering):
        model = TorchCutModel(trainer, adapter, task)
        return CutForwardTrainer(model, directions, away, config.train.probes)
    return ForwardOnlyTrainer(trainer, directions, away)
