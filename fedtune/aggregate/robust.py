"""Combining single updates so that a few wrong ones do little harm.

These need to see every update by itself, so they cannot run under secure aggregation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def coordinate_median(updates: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median of each coordinate of `updates` `[clients, size]` (Yin et al. 2018, algorithm 1)."""
    return np.asarray(np.median(updates, axis=0))


def krum(updates: NDArray[np.float64]) -> NDArray[np.float64]:
    """The one of `updates` `[clients, size]` that is closest to its neighbours.

    Blanchard et al. 2017, section 4: the least sum of squared distances to its n - f - 2 nearest
    others, where f, the number of wrong updates that it withstands, is the largest with
    n ≥ 2f + 3. Ties go to the first. With fewer than 3 clients it is the first.
    """
    clients = len(updates)
    wrong = max(0, (clients - 3) // 2)
    nearest = max(1, clients - wrong - 2)
    squares = np.einsum("ij,ij->i", updates, updates)
    distances = squares[:, None] + squares[None, :] - 2 * updates @ updates.T
    np.fill_diagonal(distances, np.inf)
    scores = np.sort(distances, axis=1)[:, :nearest].sum(axis=1)
    chosen: NDArray[np.float64] = updates[int(np.argmin(scores))]
    return chosen


COMBINATIONS = {"median": coordinate_median, "krum": krum}
