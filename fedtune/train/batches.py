"""Which examples a client trains on, as a function of seed, round and client alone.

So a round can be repeated after a crash, on another machine or in another order of clients,
and trains on the same batches.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

# How many batches are cut from one length-sorted pool. Larger pools pad less and mix less.
POOL_BATCHES = 16


def client_rng(seed: int, round_number: int, client: str) -> np.random.Generator:
    """A generator for one client in one round; clients are told apart by name."""
    name = int.from_bytes(hashlib.sha256(client.encode()).digest()[:8], "little")
    return np.random.default_rng([seed, round_number, name])


def dropout_seed(rng: np.random.Generator) -> int:
    """A seed that leaves the generator's own stream, and so the batches, as they were."""
    return int(rng.spawn(1)[0].integers(2**63))


def rounding_rng(seed: int, round_number: int, client: str) -> np.random.Generator:
    """A generator for rounding a client's update, apart from its batches and dropout."""
    return client_rng(seed, round_number, client).spawn(2)[1]


def plan_batches(
    lengths: NDArray[np.int64], steps: int, batch_size: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Yield `steps` arrays of row indices (int64 `[min(batch_size, n)]`).

    Rows are drawn without replacement until all were seen, then again; no batch holds a row
    twice. Within a pool of up to `POOL_BATCHES` batches, rows of similar length share a batch,
    so little is padding; the order of the batches is random.
    """
    rows = len(lengths)
    batch_size = min(batch_size, rows)
    left = steps
    waiting = np.empty(0, np.int64)  # rows of this pass that were not yet drawn, all different
    while left > 0:
        if len(waiting) < batch_size:
            fresh = rng.permutation(rows)
            repeated = np.isin(fresh, waiting)
            # Those left over come first, and again last: no batch holds a row twice.
            waiting = np.concatenate([waiting, fresh[~repeated], fresh[repeated]])
        batches = min(POOL_BATCHES, left, rows // batch_size, len(waiting) // batch_size)
        pool, waiting = np.split(waiting, [batches * batch_size])
        pool = pool[np.argsort(lengths[pool], kind="stable")].reshape(batches, batch_size)
        yield from pool[rng.permutation(batches)]
        left -= batches


def learning_rate(
    schedule: str, lr: float, final_fraction: float, position: int, length: int
) -> float:
    """Learning rate at `position` (from 0) of `length`; the last one is `lr * final_fraction`."""
    if schedule == "constant" or length == 1:
        return lr
    progress = position / (length - 1)
    weight = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return lr * (final_fraction + (1 - final_fraction) * weight)
