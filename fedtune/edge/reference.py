"""The batches, settings and marks at which devices and PyTorch are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedtune.train.texts import Batch

MARKS = (1, 10, 50)  # steps
LEARNING_RATES: dict[Literal["sgd", "adamw"], float] = {"sgd": 0.05, "adamw": 1e-3}
WEIGHT_DECAY = 0.01


def batch_of(tensors: Mapping[str, NDArray[Any]], number: int) -> Batch:
    """Batch `number` of a reference."""
    ids, mask, labels = (
        tensors[f"{name}-{number}"].astype(np.int64) for name in ("ids", "mask", "labels")
    )
    return Batch(ids, mask, labels)
