"""Skellam noise: integers, exact, and closed under addition.

The difference of two Poisson variables of mean variance/2 each (Agarwal et al. 2021, "The Skellam
mechanism for differentially private federated learning", arXiv 2110.04995). The sum of n clients'
independent draws is Skellam noise of n times the variance, so each client adds a share and only
the sum, which is all that the server sees, is private.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ConfigError
from fedtune.privacy.randomness import SecureRandom

_MAX_ENTRIES = 1 << 22
_MIN_VARIANCE = 1e-6
_TAIL_BITS = 64
# What the table leaves out weighs less than 2⁻¹⁰⁰. The recurrence starts further out, where its
# start, which is a guess, weighs nothing in what the table holds.
_TABLE_BITS = 100
_START_BITS = 230
_CHUNK = 1 << 18


@dataclass(frozen=True)
class SkellamNoise:
    """One client's share of the noise; `variance` is per coordinate, in integer units squared.

    Raises `ConfigError` if the variance is not positive or too large for a table.
    """

    variance: float

    def __post_init__(self) -> None:
        if not _MIN_VARIANCE <= self.variance < math.inf:
            raise ConfigError(
                f"a noise variance of {self.variance} integer units squared is not in "
                f"[{_MIN_VARIANCE}, infinity)"
            )
        if 2 * _reach(self.variance, _TABLE_BITS) + 1 > _MAX_ENTRIES:
            raise ConfigError(
                f"noise with a standard deviation of {math.sqrt(self.variance):.6g} integer units "
                f"per client needs a table of more than {_MAX_ENTRIES} entries; use fewer bits "
                "or a larger privacy budget"
            )

    def sample(self, n: int) -> NDArray[np.int64]:
        """int64 `[n]`, independent; each within a statistical distance of 2⁻⁹⁰ of Skellam.

        The distribution function is inverted at 128 uniform bits, in integers: there is no
        floating-point arithmetic that could leak (Mironov 2012), and no seed.
        """
        table = skellam_table(float(self.variance))
        random = SecureRandom()
        values = np.empty(n, np.int64)
        for start in range(0, n, _CHUNK):
            part = values[start : start + _CHUNK]
            part[...] = table.invert(random.uint64(part.size), random.uint64(part.size))
        return values

    def tail(self, clients: int) -> int:
        """A bound that the sum of `clients` draws exceeds, either way, with p ≤ 2⁻⁶⁴."""
        return _reach(clients * self.variance, _TAIL_BITS)


@dataclass(frozen=True, eq=False)
class SkellamTable:
    """The distribution function at `first`, `first` + 1, ... as integers of 128 bits.

    `high` and `low` are uint64 `[entries]`; the last value's 2¹²⁸ is left out.
    """

    first: int
    high: NDArray[np.uint64]
    low: NDArray[np.uint64]

    def invert(self, high: NDArray[np.uint64], low: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The values, int64 `[n]`, at the uniform 128-bit integers `high`·2⁶⁴ + `low`."""
        place = np.searchsorted(self.high, high, side="left").astype(np.int64, copy=False)
        entry = np.minimum(place, self.high.size - 1)
        # Once in 2⁴⁰ draws or less the high words are equal and the low words decide.
        for i in np.flatnonzero(self.high[entry] == high):
            target = int(high[i]) << 64 | int(low[i])
            while place[i] < self.high.size and self._entry(int(place[i])) <= target:
                place[i] += 1
        return place + self.first

    def _entry(self, place: int) -> int:
        return int(self.high[place]) << 64 | int(self.low[place])


@lru_cache(maxsize=8)
def skellam_table(variance: float) -> SkellamTable:
    """The table for `variance`; about 24 standard deviations long."""
    weights = _bessel(variance)
    last = _reach(variance, _TABLE_BITS)
    beyond = sum(weights[last + 1 :])
    total = weights[0] + 2 * sum(weights[1:])
    running = beyond  # the tails count for the outermost values
    entries = []
    for k in range(-last, last):
        running += weights[abs(k)]
        entries.append(((running << 128) // total).to_bytes(16, "big"))
    words = np.frombuffer(b"".join(entries), ">u8").reshape(-1, 2).astype(np.uint64)
    high, low = np.ascontiguousarray(words.T)
    return SkellamTable(-last, high, low)


def _bessel(variance: float) -> list[int]:
    """Integers proportional to I₀(variance), I₁(variance), ..., to 64 significant bits or more.

    P(X = k) is I_|k|(v) / (I₀(v) + 2 I₁(v) + 2 I₂(v) + ...) for the modified Bessel functions of
    the first kind. Miller's algorithm: I_{k-1} = I_{k+1} + (2k/v) I_k downwards from far out,
    which is stable since every term is positive (Abramowitz and Stegun, 9.6.26 and 9.12).
    """
    numerator, denominator = variance.as_integer_ratio()
    start = _reach(variance, _START_BITS)
    above, here = 0, 1 << 64
    values = [here]
    for k in range(start, 0, -1):
        above, here = here, above + 2 * k * denominator * here // numerator
        values.append(here)
    return values[::-1]


def _reach(variance: float, bits: int) -> int:
    """The smallest bound that Skellam noise exceeds, either way, with p ≤ 2^-`bits`.

    Chernoff's bound with the moment generating function exp(v (cosh λ - 1)) (Agarwal et al.
    2021, section 2), at the best λ, which is asinh(k/v): the smallest by that bound.
    """
    below, enough = -1, 1
    while _log_tail(variance, enough) > -bits * math.log(2):
        below, enough = enough, 2 * enough
    while enough - below > 1:
        middle = (below + enough) // 2
        if _log_tail(variance, middle) > -bits * math.log(2):
            below = middle
        else:
            enough = middle
    return enough


def _log_tail(variance: float, bound: int) -> float:
    """log of a bound on P(|X| > `bound`)."""
    k = bound + 1
    t = k / variance
    # v (cosh λ - 1) at λ = asinh t, without the cancellation of √(1 + t²) - 1 for small t
    moment = variance * t * (t / (math.hypot(1, t) + 1))
    return math.log(2) + moment - k * math.asinh(t)
