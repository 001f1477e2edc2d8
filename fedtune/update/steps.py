"""Update steps: a client goes through the list forwards, the server backwards.

A step that is off is absent from the list; no step asks whether it is on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtune.config import Update
from fedtune.errors import MalformedMessage, TrainingError
from fedtune.types import Float32Vector

Vector = NDArray[Any]


class Step(Protocol):
    """One reversible step on a flat vector; it may change the dtype, not the length."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype that `forward` gives, little-endian."""

    def forward(self, update: Vector) -> Vector:
        """At the client."""

    def backward(self, update: Vector) -> Vector:
        """At the server."""


class HalfPrecision:
    """float32 → IEEE float16 and back: 11 significant bits, half the bytes."""

    dtype = np.dtype("<f2")

    def forward(self, update: Vector) -> Vector:
        """Round to nearest; raises `TrainingError` if a value is beyond float16's 65504."""
        if np.abs(update).max(initial=0.0) > np.finfo(np.float16).max:
            raise TrainingError(
                "an update value is beyond the range of float16; lower train.lr or set "
                "update.compress = none"
            )
        return update.astype(self.dtype)

    def backward(self, update: Vector) -> Vector:
        """Exact."""
        return update.astype(np.float32)


class UpdatePipeline:
    """An update of `size` float32 values to bytes through the steps, and back."""

    def __init__(self, size: int, steps: Sequence[Step] = ()) -> None:
        self.size = size
        self._steps = tuple(steps)
        self._dtype = self._steps[-1].dtype if self._steps else np.dtype("<f4")

    @property
    def encoded_bytes(self) -> int:
        """The only length that an encoded update can have."""
        return self.size * self._dtype.itemsize

    def encode(self, update: Float32Vector) -> bytes:
        """At the client: all steps forwards."""
        vector: Vector = update
        for step in self._steps:
            vector = step.forward(vector)
        return vector.astype(self._dtype, copy=False).tobytes()

    def decode(self, data: bytes) -> Float32Vector:
        """At the server: all steps backwards; raises `MalformedMessage` if not finite."""
        vector: Vector = np.frombuffer(data, self._dtype)
        if vector.shape != (self.size,):
            raise MalformedMessage(f"an update of {vector.size} values, not {self.size}")
        if not np.isfinite(vector).all():
            count = int((~np.isfinite(vector)).sum())
            raise MalformedMessage(f"{count} of {self.size} values are not finite")
        for step in reversed(self._steps):
            vector = step.backward(vector)
        return vector.astype(np.float32, copy=False)


def make_pipeline(update: Update, size: int) -> UpdatePipeline:
    """The update steps that the configuration names, for an adapter of `size` values."""
    return UpdatePipeline(size, [HalfPrecision()] if update.compress == "float16" else [])
