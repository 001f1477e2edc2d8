"""The batches, settings and marks at which devices and PyTorch are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedtune.train.texts import Batch
from fedtune.types import Task

MARKS = (1, 10, 50)  # steps
# With larger ones a language model's steps magnify rounding errors faster than they learn.
LEARNING_RATES: dict[Task, dict[Literal["sgd", "adamw"], float]] = {
    "text-classification": {"sgd": 0.05, "adamw": 1e-3},
    "causal-lm": {"sgd": 0.01, "adamw": 1e-4},
}
WEIGHT_DECAY = 0.01


def batch_of(tensors: Mapping[str, NDArray[Any]], number: int) -> Batch:
    """Batch `number` of a reference."""
    ids, mask, labels = (
        tensors[f"{name}-{number}"].astype(np.int64) for name in ("ids", "mask", "labels")
    )
    return Batch(ids, mask, labels)
