"""States of a frozen language model, kept so that each example is asked for once."""

from __future__ import annotations

import logging
import mmap

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)
MOST_BYTES = 1 << 30
_FLOAT16 = np.finfo(np.float16)


class StateCache:
    """One row of float16 values for each example, by the example's number.

    All processes that are forked after it was made share it. It reserves `most_bytes` of addresses;
    memory is what was written to, 2 bytes a value. Examples beyond its last row are never kept.
    """

    def __init__(self, values: int, most_bytes: int = MOST_BYTES) -> None:
        self.rows = max(1, most_bytes // (2 * values))
        self._states = np.frombuffer(mmap.mmap(-1, self.rows * values * 2), np.float16).reshape(
            self.rows, values
        )
        self._known = np.frombuffer(mmap.mmap(-1, self.rows), np.bool_)
        self._said = False

    def known(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these examples are there."""
        inside = numbers < self.rows
        if not inside.all() and not self._said:
            self._said = True
            logger.warning(
                "activations of %d examples are kept, those of others are asked for each time",
                self.rows,
            )
        return inside & self._known[np.minimum(numbers, self.rows - 1)]

    def get(self, numbers: NDArray[np.int64]) -> NDArray[np.float16]:
        """The states of examples that are there."""
        return self._states[numbers]

    def put(self, numbers: NDArray[np.int64], states: NDArray[np.float16]) -> None:
        """Keep them, as far as there is room."""
        inside = numbers < self.rows
        self._states[numbers[inside]] = states[inside]
        self._known[numbers[inside]] = True  # last: another process may be reading


def halved(states: NDArray[np.float32]) -> NDArray[np.float16]:
    """As the cache keeps them; what overflows is cut to the largest finite value."""
    return np.clip(states, _FLOAT16.min, _FLOAT16.max).astype(np.float16)
