"""How a server's run is doing: what `/health` and `/metrics` tell of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Literal

from fedtune.flower.observer import Failure, Observer
from fedtune.records import RoundRecord

State = Literal["starting", "waiting", "running", "finished", "failed"]
# While they wait for anyone, the rounds look at the network every second.
SILENT_SECONDS = 60.0
ROUND_SECONDS = (1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


@dataclass(frozen=True)
class Totals:
    """What the rounds in the journal come to."""

    committed: int = 0
    lost: int = 0  # of them came to nothing
    bytes_up: int = 0
    bytes_down: int = 0
    train_seconds: float = 0.0
    seconds: float = 0.0
    at_most: tuple[int, ...] = (0,) * len(ROUND_SECONDS)  # rounds no longer than `ROUND_SECONDS`

    def plus(self, record: RoundRecord) -> Totals:
        """With one more round."""
        return Totals(
            self.committed + 1,
            self.lost + (not record.clients),
            self.bytes_up + record.bytes_up,
            self.bytes_down + record.bytes_down,
            self.train_seconds + max(0.0, record.train_seconds),  # clients say it
            self.seconds + record.seconds,
            tuple(
                number + (record.seconds <= bound)
                for number, bound in zip(self.at_most, ROUND_SECONDS, strict=True)
            ),
        )


@dataclass(frozen=True)
class Snapshot:
    """All of it at one moment."""

    clients: tuple[str, ...]  # of the roster
    planned: int
    totals: Totals
    began_at: float  # seconds since 1970
    heard_at: float  # when the rounds gave a sign of life, by the clock of `Status`
    round: int  # the one that is under way, or else the last
    state: State = "starting"
    stage: str = ""
    waiting_for: tuple[str, ...] = ()
    connected: frozenset[str] = frozenset()
    epsilon: float | None = None
    failures: Counter[Failure] = field(default_factory=Counter)  # since this process began
    committed_at: float | None = None  # seconds since 1970; by this process
    reason: str = ""  # why the run failed


class Status(Observer):
    """Told by the rounds what happens. Other threads ask; the rounds wait for none of them."""

    def __init__(
        self,
        clients: Sequence[str],
        planned: int,
        records: Sequence[RoundRecord],
        patience: float,
        epsilon: Callable[[], float | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`records` are those of the journal, and `epsilon` asks it what was spent.

        The server may compute for `patience` seconds without a sign of life, as a client may.
        """
        self._patience, self._epsilon, self._clock = max(patience, SILENT_SECONDS), epsilon, clock
        self._now = Snapshot(
            tuple(sorted(clients)),
            planned,
            reduce(Totals.plus, records, Totals()),
            time.time(),
            clock(),
            records[-1].round if records else 0,
            epsilon=epsilon(),
        )

    @property
    def snapshot(self) -> Snapshot:
        """What is so now."""
        return self._now

    def looked(self, names: frozenset[str]) -> None:
        """These clients are connected, and the rounds go on."""
        self._change(connected=names & frozenset(self._now.clients))

    def waiting(self, found: int, wanted: int) -> None:
        """See `Observer`."""
        self._change(state="waiting", stage="", waiting_for=())

    def round_running(
        self, round_number: int, stage: str, waiting_for: Sequence[str], total: int
    ) -> None:
        """See `Observer`."""
        names = tuple(waiting_for)
        self._change(state="running", round=round_number, stage=stage, waiting_for=names)

    def client_failed(self, name: str, failure: Failure) -> None:
        """See `Observer`."""
        self._change(failures=self._now.failures + Counter([failure]))

    def round_committed(self, record: RoundRecord) -> None:
        """See `Observer`."""
        self._change(
            totals=self._now.totals.plus(record),
            stage="",
            waiting_for=(),
            committed_at=time.time(),
            epsilon=self._epsilon(),
        )

    def ended(self, state: State, reason: str = "") -> None:
        """No round follows."""
        self._change(state=state, stage="", waiting_for=(), reason=reason)

    def trouble(self) -> str:
        """What is wrong, in words; empty: nothing."""
        now = self._now
        if now.state == "failed":
            return f"the run failed: {now.reason}"
        waits = now.state == "waiting" or bool(now.waiting_for)
        silence = self._clock() - now.heard_at
        if silence > (SILENT_SECONDS if waits else self._patience):
            return f"the rounds have given no sign of life for {silence:.0f} s"
        return ""

    def to_json(self) -> dict[str, Any]:
        """The run in plain JSON values."""
        now = self._now
        since = None if now.committed_at is None else round(time.time() - now.committed_at, 1)
        return {
            "state": now.state,
            "round": now.round,
            "rounds_planned": now.planned,
            "rounds_committed": now.totals.committed,
            "stage": now.stage,
            "waiting_for": list(now.waiting_for),
            "connected": sorted(now.connected),
            "missing": sorted(set(now.clients) - now.connected),
            "seconds_since_commit": since,
        }

    def _change(self, **fields: Any) -> None:
        # One thread changes it, and to exchange a reference needs no lock.
        self._now = replace(self._now, heard_at=self._clock(), **fields)
