"""Updates that arrive in the clear, as floats or as integers, and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedtune.aggregate import OrderedSum
from fedtune.aggregate.robust import COMBINATIONS
from fedtune.errors import MalformedMessage
from fedtune.round.terms import make_ring
from fedtune.update import UpdatePipeline
from fedtune.update.quantize import Quantizer


class UpdateSum(Protocol):
    """The weighted sum of one round's updates."""

    def add(self, place: int, data: bytes, weight: float) -> None:
        """Count the update of the client in `place`; raises `MalformedMessage`."""

    def skip(self, place: int) -> None:
        """The client in `place` failed."""

    def result(self) -> tuple[NDArray[np.float64], float]:
        """The sum (float64 `[size]`) and the sum of the weights."""


class Updates(Protocol):
    """What updates look like on the wire, and how they are summed."""

    @property
    def encoded_bytes(self) -> int:
        """The only length that an encoded update can have."""

    def sum(self, places: int) -> UpdateSum:
        """An empty sum for `places` clients."""


class FloatUpdates:
    """Float vectors after the update steps."""

    def __init__(self, pipeline: UpdatePipeline, rule: str = "fedavg") -> None:
        """With a robust `rule` its choice stands in for the weighted mean."""
        self.pipeline = pipeline
        self.encoded_bytes = pipeline.encoded_bytes
        self._combine = COMBINATIONS.get(rule)

    def sum(self, places: int) -> UpdateSum:
        """See `Updates.sum`."""
        if self._combine is not None:
            return _Combination(self.pipeline, self._combine)
        return _FloatSum(self.pipeline, places)


class IntegerUpdates:
    """Integer vectors that carry their own weight: the same sum as under masks."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.encoded_bytes = make_ring(quantizer, 1).packed_bytes(quantizer.slots)

    def sum(self, places: int) -> UpdateSum:
        """See `Updates.sum`."""
        return _IntegerSum(self.quantizer)


class _FloatSum:
    def __init__(self, pipeline: UpdatePipeline, places: int) -> None:
        self._pipeline = pipeline
        self._sum = OrderedSum(pipeline.size, places)

    def add(self, place: int, data: bytes, weight: float) -> None:
        self._sum.add(place, self._pipeline.decode(data), weight)

    def skip(self, place: int) -> None:
        self._sum.skip(place)

    def result(self) -> tuple[NDArray[np.float64], float]:
        return self._sum.total, self._sum.weight


class _Combination:
    def __init__(
        self,
        pipeline: UpdatePipeline,
        combine: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    ) -> None:
        self._pipeline = pipeline
        self._combine = combine
        self._updates: dict[int, NDArray[np.float64]] = {}

    def add(self, place: int, data: bytes, weight: float) -> None:
        self._updates[place] = self._pipeline.decode(data).astype(np.float64)

    def skip(self, place: int) -> None:
        pass

    def result(self) -> tuple[NDArray[np.float64], float]:
        # By place and not by arrival: a tie must not depend on who was faster.
        ordered = [self._updates[place] for place in sorted(self._updates)]
        return self._combine(np.stack(ordered)), 1.0


class _IntegerSum:
    def __init__(self, quantizer: Quantizer) -> None:
        self._quantizer = quantizer
        self._ring = make_ring(quantizer, 1)
        self._total = np.zeros(quantizer.slots, np.int64)
        self._clients = 0

    def add(self, place: int, data: bytes, weight: float) -> None:
        values = self._ring.lift(self._ring.unpack(data, self._quantizer.slots))
        if np.abs(values).max(initial=0) > self._quantizer.bound:
            raise MalformedMessage(f"a value is beyond the bound of {self._quantizer.bound}")
        self._total += values
        self._clients += 1

    def skip(self, place: int) -> None:
        pass

    def result(self) -> tuple[NDArray[np.float64], float]:
        found = self._quantizer.decode(self._total, self._clients)
        return found.total, found.weight
