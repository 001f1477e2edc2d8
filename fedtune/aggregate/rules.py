"""Aggregation rules: pure functions on flat vectors, no I/O.

All rules here see only the weighted sum of updates, so they are linear in what clients
upload and can run when the server learns nothing but that sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedtune.types import Float32Vector

# What a rule keeps from round to round: named float64 vectors, stored in the journal.
RuleState = dict[str, NDArray[np.float64]]


class Rule(Protocol):
    """`init` once, then `apply` after each round."""

    @property
    def linear(self) -> bool:
        """Whether the rule needs only the weighted sum of the updates."""

    def init(self, size: int) -> RuleState:
        """State before round 1, for an adapter of `size` values."""

    def apply(
        self, state: RuleState, adapter: Float32Vector, total: NDArray[np.float64], weight: float
    ) -> tuple[RuleState, Float32Vector]:
        """New state and adapter (float32 `[size]`) from the weighted sum `total` of the updates.

        `weight` is the sum of the weights, above 0.
        """


@dataclass(frozen=True)
class MomentumRule:
    """Federated averaging, with the server's rate and momentum.

    At `lr` 1 and `momentum` 0 this is FedAvg (McMahan et al. 2017, algorithm 1); otherwise
    FedAvgM (Hsu et al. 2019, arXiv 1909.06335, section 4.3): v ← βv + Δ, θ ← θ + ηv.
    """

    lr: float = 1.0
    momentum: float = 0.0
    linear: bool = True

    def init(self, size: int) -> RuleState:
        """The velocity, zero; no state without momentum."""
        return {"velocity": np.zeros(size)} if self.momentum else {}

    def apply(
        self, state: RuleState, adapter: Float32Vector, total: NDArray[np.float64], weight: float
    ) -> tuple[RuleState, Float32Vector]:
        """See `Rule.apply`."""
        step = total / weight
        if self.momentum:
            step = self.momentum * state["velocity"] + step
            state = {"velocity": step}
        return state, (adapter + self.lr * step).astype(np.float32)


@dataclass(frozen=True)
class AdamRule:
    """FedAdam (Reddi et al. 2021, arXiv 2003.00295, algorithm 2; no bias correction, as there).

    m ← β₁m + (1-β₁)Δ, v ← β₂v + (1-β₂)Δ², θ ← θ + η m / (√v + τ), with v₀ = τ².
    """

    lr: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    linear: bool = True

    def init(self, size: int) -> RuleState:
        """First moment 0, second moment τ² (section 2 of the paper's experiments)."""
        return {"first": np.zeros(size), "second": np.full(size, self.tau**2)}

    def apply(
        self, state: RuleState, adapter: Float32Vector, total: NDArray[np.float64], weight: float
    ) -> tuple[RuleState, Float32Vector]:
        """See `Rule.apply`."""
        mean = total / weight
        first = self.beta1 * state["first"] + (1 - self.beta1) * mean
        second = self.beta2 * state["second"] + (1 - self.beta2) * mean**2
        step = self.lr * first / (np.sqrt(second) + self.tau)
        return {"first": first, "second": second}, (adapter + step).astype(np.float32)
