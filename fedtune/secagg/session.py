"""What one session of secure aggregation is about, and the terms on which it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from fedtune.errors import ConfigError
from fedtune.secagg.graph import MaskGraph
from fedtune.secagg.transcript import digest, number
from fedtune.types import RoundContext

MINIMUM_COHORT = 3  # with two, each learns the other's update from the sum


@dataclass(frozen=True)
class Session:
    """One attempt at one round. Its digest is part of every signature, seal and key.

    `adapter_digest` (SHA-256 of the global adapter, hex) makes all clients of a session train
    from the same adapter: a server that gives one of them another cannot add it up with the
    others (Pasquini et al. 2022, arXiv 2111.07380).
    """

    context: RoundContext
    attempt: int
    adapter_digest: str
    roster_digest: bytes

    @cached_property
    def digest(self) -> bytes:
        """32 bytes."""
        context = self.context
        digests = (
            context.base_digest,
            context.manifest_digest,
            context.config_digest,
            self.adapter_digest,
        )
        return digest(
            "session",
            [
                context.run_id.encode(),
                number(context.round),
                number(self.attempt),
                *(bytes.fromhex(text) for text in digests),
                self.roster_digest,
            ],
        )


@dataclass(frozen=True)
class Terms:
    """What a federation's configuration says of secure aggregation.

    `threshold` is a fraction of the cohort, `colluding` of the roster.

    `minimum` is the smallest number of updates that is ever added up; `neighbours` with how
    many others a client masks, None: with all. `roster` is how many clients there are: the server
    chooses whom of them it invites, and all that collude may be among those.
    """

    threshold: float = 2 / 3
    colluding: float = 1 / 4
    minimum: int = MINIMUM_COHORT
    neighbours: int | None = None
    roster: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.threshold < 1 and 0 <= self.colluding < 1):
            raise ValueError("threshold and colluding are fractions")

    def threshold_of(self, clients: int) -> int:
        """How many clients it takes to open a mask: more than `threshold` of `clients`."""
        return min(clients, math.floor(clients * self.threshold + 1e-9) + 1)

    def colluders_of(self, clients: int) -> int:
        """How many of a cohort of `clients` may be in league with the server."""
        return math.ceil(max(clients, self.roster) * self.colluding - 1e-9)

    def graph_of(self, clients: int) -> MaskGraph:
        """Who masks with whom."""
        half = clients if self.neighbours is None else self.neighbours // 2
        return MaskGraph(clients, half)

    def fewest_survivors(self, clients: int) -> int:
        """The fewest updates that a finished session of `clients` adds up."""
        # Two honest updates at least: one alone would be the sum less what colluders know.
        return max(self.threshold_of(clients), self.minimum, self.colluders_of(clients) + 2)

    def protects(self, clients: int) -> bool:
        """Whether `check` accepts a cohort of `clients`."""
        try:
            self.check(clients)
        except ConfigError:
            return False
        return True

    def check(self, clients: int) -> None:
        """Raise `ConfigError` unless the terms protect a cohort of `clients`.

        With c colluders, a threshold t of n keeps a server from opening two different masks
        of one client if 2t > n + c (Bonawitz et al. 2017, section 6.2): it would need t
        answers to each of two survivor sets, and the n - c honest clients answer one each.
        """
        threshold, colluders = self.threshold_of(clients), self.colluders_of(clients)
        least = max(MINIMUM_COHORT, self.minimum)
        if clients < least:
            raise ConfigError(
                f"secure aggregation of {clients} clients, but at least {least} are needed"
            )
        if clients < colluders + 2:
            raise ConfigError(
                f"secagg.colluding: {colluders} clients may collude, and all may be in a cohort of "
                f"{clients}, so less than two would be honest; take larger cohorts, or count on "
                "fewer colluders"
            )
        if 2 * threshold <= clients + colluders:
            raise ConfigError(
                f"secagg.threshold: {threshold} of {clients} clients do not withstand {colluders} "
                f"colluders; it takes {(clients + colluders) // 2 + 1}, or larger cohorts"
            )
        withstood = self.graph_of(clients).colluders_withstood(range(clients))
        if withstood < colluders:
            raise ConfigError(
                f"secagg.neighbours = {self.neighbours}: a cohort of {clients} withstands "
                f"{withstood} colluders, secagg.colluding asks for {colluders}; "
                f"take more than {colluders + 1} neighbours"
            )
