"""What is exported."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fedtune.adapter.lora import AttachedAdapter
from fedtune.base.causal import CausalBase, position_logits
from fedtune.base.classifier import BaseModel
from fedtune.types import Task


@dataclass(frozen=True)
class EdgeModel:
    """A base model with an attached adapter; `max_length` in tokens."""

    base: BaseModel | CausalBase
    adapter: AttachedAdapter
    pad_id: int
    max_length: int

    @property
    def task(self) -> Task:
        """What the base model is for."""
        return "causal-lm" if isinstance(self.base, CausalBase) else "text-classification"

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """One row of logits for each label of a batch, float32."""
        return logits_of(self.adapter.module, self.task, ids, mask)


def logits_of(module: nn.Module, task: Task, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits of a task, float32 `[labels of the batch, classes]`."""
    if task == "causal-lm":
        return position_logits(module, ids, mask)
    logits: Tensor = module(ids, mask)
    return logits
