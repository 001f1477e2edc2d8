"""The privacy account: what was released so far, and the (ε, δ) that it comes to.

Two kinds of releases, never in one ledger, because they protect different things:

- "client": each round's sum of the clients' integer vectors with Skellam noise. Hides all data of a
  client: its vector exchanged for zeros. That it took part is known. Sampling clients is never
  counted as amplification: the server chooses the cohort, and it is to be protected from.
- "record": the Gaussian noise of local training by DP-SGD. Hides whether a training example was
  there (add or remove one). Batches are Poisson samples that the client draws by itself, so
  sampling does count. Clients' examples are disjoint, so each client has its own account.

Both are bounded by Rényi divergences (Mironov 2017, arXiv 1702.07476), which add up over
releases, and are converted at the end by dp-accounting.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import BudgetExceeded, ConfigError, RunFolderError

# The bound for Skellam noise is proven at integers only.
CLIENT_ORDERS: tuple[int, ...] = (
    *range(2, 129),
    *(round(128 * 2 ** (i / 8)) for i in range(1, 57)),
)
# dp-accounting's own grid, with more orders where it has gaps.
RECORD_ORDERS: tuple[float, ...] = (
    *(1 + i / 10 for i in range(1, 100)),
    *range(11, 65),
    *(round(64 * 2 ** (i / 4)) for i in range(1, 17)),
)
# Calibration aims this much lower, so that rounding cannot make the last release one too many.
_MARGIN = 1e-6


def integer_l1(size: int, l2: float) -> float:
    """The largest L1 norm of `size` integers whose L2 norm is at most `l2`.

    √size · l2 by Cauchy and Schwarz; l2² because |k| ≤ k² for integers.
    """
    return min(math.sqrt(size) * l2, l2**2)


def sampling_rate(batch_size: int, rows: int) -> float:
    """The chance of each of `rows` examples to be in a batch, for the draw and for its account."""
    return min(1.0, batch_size / rows)


def skellam_rdp(order: int, l2: float, l1: float, variance: float) -> float:
    """Rényi divergence of `order` between Skellam noise and itself shifted, at most.

    For shifts by integer vectors of norms at most `l2` and `l1`; `variance` is per coordinate,
    of the noise in the sum. All in integer units. Agarwal et al. 2021, arXiv 2110.04995,
    theorem 3.5, for an integer `order` above 1; anything else is a `ValueError`.
    """
    if order != int(order) or order < 2:
        raise ValueError(f"the bound holds at the orders 2, 3, ..., not at {order}")
    # Divided twice: the square of a small variance could be 0.
    gaussian = order * l2 * l2 / (2 * variance)
    by_both = ((2 * order - 1) * l2 * l2 + 6 * l1) / (4 * variance) / variance
    by_l1 = 3 * l1 / (2 * variance)
    return gaussian + min(by_both, by_l1)


@dataclass(frozen=True)
class ClientRelease:
    """One round's noised sum: whether a client took part.

    `l2` and `l1` bound the norms of one client's integer vector, and `variance` is the noise's
    per coordinate in the sum, with as few shares as may be in it: those of the fewest clients
    that the round goes on with.
    """

    round: int
    l2: float
    l1: float
    variance: float
    kind: Literal["client"] = "client"

    def __post_init__(self) -> None:
        _check(self)

    def orders(self) -> tuple[float, ...]:
        """The orders of `rdp`."""
        return CLIENT_ORDERS

    def rdp(self) -> NDArray[np.float64]:
        """Rényi divergence at each order, float64 `[orders]`."""
        return np.array([skellam_rdp(a, self.l2, self.l1, self.variance) for a in CLIENT_ORDERS])


@dataclass(frozen=True)
class RecordRelease:
    """One client's local training in one round: whether a training example was there.

    `sampling_rate` in (0, 1] is each example's probability to be in a batch,
    `noise_multiplier` the noise's standard deviation over the clipping norm of an example's
    gradient, `steps` how many batches.
    """

    round: int
    sampling_rate: float
    noise_multiplier: float
    steps: int
    kind: Literal["record"] = "record"

    def __post_init__(self) -> None:
        _check(self)
        if self.sampling_rate > 1:
            raise ValueError(f"sampling_rate is {self.sampling_rate}, above 1")

    def orders(self) -> tuple[float, ...]:
        """The orders of `rdp`."""
        return RECORD_ORDERS

    def rdp(self) -> NDArray[np.float64]:
        """Rényi divergence at each order, float64 `[orders]`."""
        return self.steps * _subsampled_gaussian(self.sampling_rate, self.noise_multiplier)


Release = ClientRelease | RecordRelease


class Ledger:
    """All releases of one kind, in order; they can be added to and never taken back.

    A release that was repeated, say after a crash with other noise, is there twice.
    """

    def __init__(self, releases: Iterable[Release] = ()) -> None:
        self._releases: list[Release] = []
        for release in releases:
            self.append(release)

    @property
    def releases(self) -> tuple[Release, ...]:
        """All releases, the oldest first."""
        return tuple(self._releases)

    def append(self, release: Release) -> None:
        """Enter a release without asking for a budget; `ValueError` if of another kind."""
        self._releases.append(self._fitting(release))

    def epsilon(self, delta: float) -> float:
        """ε of everything so far at `delta` in (0, 1), else `ConfigError`; 0 if nothing yet."""
        return _epsilon(self._releases, delta)

    def epsilon_with(self, release: Release, delta: float) -> float:
        """ε at `delta` if `release` came next."""
        return _epsilon([*self._releases, self._fitting(release)], delta)

    def charge(self, release: Release, budget_epsilon: float, delta: float) -> None:
        """Enter `release`, to be called before anything of it leaves the machine.

        Raises `BudgetExceeded`, and enters nothing, if ε at `delta` would be above the budget.
        """
        spent = self.epsilon_with(release, delta)
        if not spent <= budget_epsilon:
            raise BudgetExceeded(
                f"round {release.round} would bring epsilon from {self.epsilon(delta):.4f} to "
                f"{spent:.4f} at delta {delta:g}, above the budget of {budget_epsilon:g}; "
                "train fewer rounds, or start afresh with more noise"
            )
        self._releases.append(release)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` gives an equal ledger back."""
        return {"releases": [asdict(release) for release in self._releases]}

    @classmethod
    def from_json(cls, data: object) -> Self:
        """The ledger that `data`, read from JSON, holds; `RunFolderError` if it is not one."""
        if not isinstance(data, dict) or set(data) != {"releases"}:
            raise RunFolderError("not a privacy ledger: one key is expected, `releases`")
        entries = data["releases"]
        if not isinstance(entries, list):
            raise RunFolderError("not a privacy ledger: `releases` is not a list")
        try:
            return cls(_read(entry) for entry in entries)
        except (TypeError, ValueError, OverflowError) as error:
            raise RunFolderError(f"not a privacy ledger: {error}") from error

    def _fitting(self, release: Release) -> Release:
        if self._releases and release.kind != self._releases[0].kind:
            raise ValueError(f"a {release.kind} release in a ledger of {self._releases[0].kind}s")
        return release


def calibrate_client_noise(
    epsilon: float, delta: float, rounds: int, l2: float, l1: float
) -> float:
    """The least variance of a sum's noise with which `rounds` rounds stay within (ε, δ).

    In integer units squared, for all shares together; `l2` and `l1` as in `ClientRelease`.
    Raises `ConfigError` if no sensible noise does.
    """

    def spent(scale: float) -> float:
        release = ClientRelease(1, l2, l1, l2**2 * scale)
        return _convert(release.orders(), rounds * release.rdp(), delta)

    _check_count("rounds", rounds)
    return l2**2 * _least(spent, epsilon, 1e-10, 1e8 * rounds)


def calibrate_record_noise(
    epsilon: float, delta: float, sampling_rate: float, steps_total: int
) -> float:
    """The least noise multiplier with which `steps_total` steps stay within (ε, δ).

    Raises `ConfigError` if no sensible noise does.
    """

    def spent(multiplier: float) -> float:
        release = RecordRelease(1, sampling_rate, multiplier, steps_total)
        return _convert(release.orders(), release.rdp(), delta)

    _check_count("steps", steps_total)
    return _least(spent, epsilon, 1e-2, 1e4 * math.sqrt(steps_total))


def _least(spent: Callable[[float], float], epsilon: float, low: float, high: float) -> float:
    """The least noise in [low, high] for which `spent`, which falls with it, is in budget."""
    if not 0 < epsilon < math.inf:
        raise ConfigError(f"epsilon is {epsilon}; it must be a positive number")
    target = epsilon * (1 - _MARGIN)
    reachable = spent(high)
    if reachable > target:
        raise ConfigError(
            f"no noise gives an epsilon of {epsilon:g}; the least is {reachable:.4g}. "
            "Allow a larger epsilon or delta"
        )
    while high > low * (1 + 1e-7):
        middle = math.sqrt(low * high)
        if spent(middle) > target:
            low = middle
        else:
            high = middle
    return high


def _epsilon(releases: list[Release], delta: float) -> float:
    if not releases:
        _check_delta(delta)
        return 0.0
    # Equal releases are counted, not added one by one: the same rounding as when calibrating.
    counts = Counter(replace(release, round=1) for release in releases)
    total = sum(count * release.rdp() for release, count in counts.items())
    return _convert(releases[0].orders(), np.asarray(total), delta)


def _convert(orders: tuple[float, ...], rdp: NDArray[np.float64], delta: float) -> float:
    """The least ε over the orders (Canonne et al. 2020, arXiv 2004.00010, proposition 12)."""
    from dp_accounting.rdp import compute_epsilon  # over two seconds

    _check_delta(delta)
    return float(compute_epsilon(orders, rdp.tolist(), delta)[0])


@lru_cache(maxsize=1024)
def _subsampled_gaussian(sampling_rate: float, noise_multiplier: float) -> NDArray[np.float64]:
    """Rényi divergence of one step at `RECORD_ORDERS`.

    Not by privacy loss distributions, which would give an ε lower by some per cent: divergences
    are added up in microseconds after each round, whatever the rounds have in common, and the
    same way for both kinds of releases.
    """
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(RECORD_ORDERS)
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    with _without_warnings():
        accountant.compose(dp_accounting.PoissonSampledDpEvent(sampling_rate, gaussian))
    # What float64 loses where it computes a divergence near 0; without it, the sum over very
    # many steps could come out too small.
    rdp: NDArray[np.float64] = np.maximum(accountant.rdp, 0) + 1e-15
    rdp.flags.writeable = False
    return rdp


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence dp-accounting about orders whose series does not converge.

    It counts them as infinite, so the least ε is still right, only at another order.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


_KINDS: dict[str, type[ClientRelease] | type[RecordRelease]] = {
    "client": ClientRelease,
    "record": RecordRelease,
}


def _read(entry: object) -> Release:
    if not isinstance(entry, dict):
        raise TypeError(f"a release is an object, not {entry!r}")
    kind = entry.get("kind")
    cls = _KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ValueError(f"no kind of release: {kind!r}")
    names = {field.name for field in fields(cls)}
    if set(entry) != names:
        raise ValueError(f"a {kind} release has the keys {sorted(names)}, not {sorted(entry)}")
    return cls(**entry)


def _check(release: Release) -> None:
    """`ValueError` if a field but `kind` is not a positive, finite number of its type."""
    for field in fields(release):
        if field.name == "kind":
            continue
        value = getattr(release, field.name)
        wanted = int if field.name in {"round", "steps"} else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise ValueError(f"{field.name} is {value!r}, not a number of its type")
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{field.name} is {value!r}; it must be positive and finite")


def _check_count(name: str, count: int) -> None:
    if count < 1:
        raise ConfigError(f"{name} is {count}; at least 1 is expected")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ConfigError(f"delta is {delta}; it must be between 0 and 1")
