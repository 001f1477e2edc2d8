"""One comparison of `fedtune edge verify`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Check:
    """How far off, how far it may be."""

    what: str
    found: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether it is near enough; NaN is not."""
        return self.found <= self.limit


def difference(found: NDArray[Any], expected: NDArray[np.float32]) -> float:
    """The largest difference of one value, as a share of the largest one where that is above 1."""
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))
