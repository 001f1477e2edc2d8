"""Metric differential privacy (d_X-privacy) of single vectors, such as embeddings of tokens.

A vector is clipped to an L2 norm and gets noise whose density at z is proportional to
exp(-η ‖z‖). Two vectors at distance d are then told apart as hardly as under an ε of η · d: for
every outcome, its densities given the one and the other differ by a factor of at most exp(η d), by
the triangle inequality (Chatzikokolakis et al. 2013; for embeddings of words Feyisetan et al. 2020,
arXiv 1910.08902; at the cut of a split model Shen et al. 2023, arXiv 2312.15603).
Clipping brings no two vectors further apart, so the bound holds for the distance before it, too.

This ε is not that of `privacy.accountant`: it is about what one token is, in one release, and says
nothing of records or clients. The two must never be added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ConfigError, TrainingError
from fedtune.privacy.randomness import SecureRandom


@dataclass(frozen=True)
class MetricPrivacy:
    """How vectors are protected before they leave.

    `clip` is the largest L2 norm, in the units of the vectors; `eta` the ε per such unit of
    distance: the less, the more noise. Raises `ConfigError` if one is not positive and finite.
    """

    clip: float
    eta: float

    def __post_init__(self) -> None:
        for name, value in (("clip", self.clip), ("eta", self.eta)):
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}; it must be positive and finite")

    @property
    def epsilon(self) -> float:
        """The ε of plain local differential privacy of one vector in one release: η · 2 · clip.

        Any two clipped vectors are at most 2 · clip apart. n releases of a vector have n times it.
        """
        return 2 * self.clip * self.eta

    def release(self, vectors: NDArray[np.float32], random: SecureRandom) -> NDArray[np.float32]:
        """Clip each row of float32 `[n, width]` and add noise of its own; the same shape.

        Raises `TrainingError` for a value that is not finite.
        """
        scale = clip_scale(vectors, self.clip)
        n, width = vectors.shape
        noise = metric_noise(n, width, self.eta, random)
        # Added up in float64: float32 then has fewer digits than the noise, and none of the
        # vector's own lowest digits survive in gaps between the values that a sum can have.
        found: NDArray[np.float32] = (vectors * scale[:, None] + noise).astype(np.float32)
        return found


def clip_scale(vectors: NDArray[np.float32], clip: float) -> NDArray[np.float64]:
    """What brings each row of `[n, width]` to an L2 norm of at most `clip`, float64 `[n]`.

    1 for a row that is short enough, also for one of zeros. Raises `TrainingError` for a value
    that is not finite: nothing could bound it.
    """
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    if not np.isfinite(norms).all():
        raise TrainingError(
            f"{int((~np.isfinite(norms)).sum())} of {len(norms)} embeddings are not finite and are "
            "not sent; lower train.lr or set train.max-grad-norm"
        )
    scale: NDArray[np.float64] = clip / np.maximum(norms, clip)
    return scale


def metric_noise(n: int, width: int, eta: float, random: SecureRandom) -> NDArray[np.float64]:
    """Draws of the density proportional to exp(-`eta` ‖z‖), float64 `[n, width]`.

    In spherical coordinates: a direction, uniform on the sphere, and a length of density
    r^(width-1) exp(-eta r), which is Gamma(width, 1/eta).
    """
    directions = random.gaussian(n * width).reshape(n, width)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return directions * (random.gamma(n, width) / eta)[:, None]
