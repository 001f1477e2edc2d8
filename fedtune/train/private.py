"""Record-level differential privacy by DP-SGD (Abadi et al. 2016, arXiv 1607.00133, algorithm 1).

Each example's gradient of the whole adapter comes from a pass of its own, whoever computes it: a
function of that example alone, whatever else was drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ConfigError
from fedtune.privacy.accountant import sampling_rate
from fedtune.types import Float32Vector

if TYPE_CHECKING:  # it imports cryptography: memory that a device has no use for
    from fedtune.privacy.randomness import SecureRandom

ExampleGradient = Callable[[int], NDArray[np.float32]]  # of the adapter's size, for a row


@dataclass(frozen=True)
class RecordPrivacy:
    """How much each record is hidden: σ and C of algorithm 1.

    The noise on the sum of gradients has the standard deviation
    `noise_multiplier * example_clip` per coordinate. A multiplier of 0 only clips: no privacy.
    """

    noise_multiplier: float
    example_clip: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ConfigError(f"the noise multiplier must be 0 or more: {self.noise_multiplier}")
        if not (math.isfinite(self.example_clip) and self.example_clip > 0):
            raise ConfigError(f"the clip of an example must be more than 0: {self.example_clip}")


def poisson_rows(rows: int, rate: float, random: SecureRandom) -> NDArray[np.int64]:
    """Draw each row by itself with probability `rate`; ascending int64, perhaps none."""
    # The accountant's amplification by sampling holds only for who cannot tell the batch, and
    # the server knows the federation's seed. So the draw is as secret as the noise.
    return np.flatnonzero(random.uniform(rows) <= rate)


def clipped_sum(
    gradient: ExampleGradient, size: int, rows: NDArray[np.int64], clip: float
) -> NDArray[np.float64]:
    """Sum over `rows` of gradients of the whole adapter, each of L2 norm `clip` at most.

    float64 `[size]`. A gradient that is not finite counts as zero: stopping for it would tell that
    such an example is there.
    """
    total = np.zeros(size)
    for row in rows:
        # In float64 the norm of float32 values is exact enough and cannot overflow.
        found = gradient(int(row)).astype(np.float64)
        norm = float(np.linalg.norm(found))
        if math.isfinite(norm):
            total += found * (clip / max(clip, norm))
    return total


def private_gradient(
    gradient: ExampleGradient,
    size: int,
    examples: int,
    batch_size: int,
    privacy: RecordPrivacy,
    random: SecureRandom,
) -> Float32Vector:
    """The gradient of one step of algorithm 1 on a fresh draw, float32 `[size]`.

    Of `examples` rows, `batch_size` are drawn on average, or all if there are fewer.
    """
    rows = poisson_rows(examples, sampling_rate(batch_size, examples), random)
    total = clipped_sum(gradient, size, rows, privacy.example_clip)
    total += privacy.noise_multiplier * privacy.example_clip * random.gaussian(size)
    # By the expected size: the drawn one is not private, and would change the sensitivity.
    return (total / min(batch_size, examples)).astype(np.float32)
