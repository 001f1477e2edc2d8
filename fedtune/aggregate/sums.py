"""A weighted sum whose value does not depend on the order in which updates arrive."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedtune.types import Float32Vector


class OrderedSum:
    """Adds updates in the order of their places, whichever comes first.

    Floating-point addition is not associative, so a sum in order of arrival would differ from
    run to run. An update waits until all places before it are filled or skipped; as clients
    are started in order of place, few wait at a time and memory stays at a few updates.
    """

    def __init__(self, size: int, places: int) -> None:
        self.total: NDArray[np.float64] = np.zeros(size)
        self.weight = 0.0
        self._places = places
        self._next = 0
        self._waiting: dict[int, tuple[Float32Vector, float] | None] = {}

    def add(self, place: int, update: Float32Vector, weight: float) -> None:
        """Fill `place` with `update` (float32 `[size]`), which counts `weight` times."""
        self._fill(place, (update, weight))

    def skip(self, place: int) -> None:
        """Leave `place` empty: its client failed."""
        self._fill(place, None)

    @property
    def complete(self) -> bool:
        """Whether every place is filled or skipped."""
        return self._next == self._places

    def _fill(self, place: int, item: tuple[Float32Vector, float] | None) -> None:
        if not self._next <= place < self._places or place in self._waiting:
            raise ValueError(f"place {place} is filled already or does not exist")
        self._waiting[place] = item
        while self._next in self._waiting:
            ready = self._waiting.pop(self._next)
            self._next += 1
            if ready is not None:
                vector, weight = ready
                self.total += weight * vector.astype(np.float64)
                self.weight += weight
