"""Fisher merging at the server: what clients weighed, divided by the sum of their weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedtune.aggregate.rules import Rule, RuleState
from fedtune.types import Float32Vector


@dataclass(frozen=True)
class FisherRule:
    """Σ w_k Δ_k / Σ w_k, value by value, for the server's `optimizer` to step by.

    Matena and Raffel 2022 (arXiv 2111.09832, equation 4), of changes instead of parameters, which
    is the same. `total` is float64 `[2 · size]`: the sum of the clients' w_k Δ_k, then that of
    `scale` · w_k (see `fedtune.update.fisher`). The sum of weights that `apply` gets is not needed:
    it is a factor of both halves.
    """

    optimizer: Rule
    scale: float = 1.0
    longest: float | None = None
    """The L2 norm to which a longer mean update is cut."""
    linear: bool = True

    def init(self, size: int) -> RuleState:
        """The optimizer's state."""
        return self.optimizer.init(size)

    def apply(
        self, state: RuleState, adapter: Float32Vector, total: NDArray[np.float64], weight: float
    ) -> tuple[RuleState, Float32Vector]:
        """See `Rule.apply`; raises `ValueError` if `total` has not two halves."""
        if total.shape != (2 * adapter.size,):
            raise ValueError(f"a sum of shape {total.shape}, not [{2 * adapter.size}]")
        above, below = total[: adapter.size], total[adapter.size :]
        # Nobody's weight, or, by who does not follow the protocol, less than that: no step.
        step = np.divide(self.scale * above, below, out=np.zeros(adapter.size), where=below > 0)
        # Honest weights are positive, and the step lies among the clients' own. Under masks one
        # client could bring a divisor close to 0 unseen; its harm stays that of one clip.
        length = float(np.linalg.norm(step))
        if self.longest is not None and length > self.longest:
            step *= self.longest / length
        return self.optimizer.apply(state, adapter, step, 1.0)
