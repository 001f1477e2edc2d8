"""The server's half of a round: who takes part, what arrives, what comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedtune.aggregate import Rule, RuleState
from fedtune.errors import JobError, MalformedMessage, TooFewClients
from fedtune.round.updates import Updates
from fedtune.types import Float32Vector, RoundContext
from fedtune.wire import codec
from fedtune.wire.context import check_context


@dataclass(frozen=True)
class Member:
    """A client that said hello."""

    name: str
    train_examples: int
    test_examples: int


@dataclass(frozen=True)
class GlobalState:
    """What goes from round to round: the adapter (float32 `[size]`) and the rule's state."""

    adapter: Float32Vector
    rule_state: RuleState


def draw_cohort(
    members: Sequence[Member], size: int | None, seed: int, round_number: int
) -> list[Member]:
    """The members that take part in a round, ordered by name: all, or `size` drawn uniformly.

    A function of names, seed and round alone, so that a repeated round has the same cohort.
    """
    ordered = sorted(members, key=lambda member: member.name)
    if size is None or size >= len(ordered):
        return ordered
    # The trailing constant keeps this stream apart from the clients' own (see `client_rng`).
    rng = np.random.default_rng([seed, round_number, 0, 1])
    return [ordered[i] for i in np.sort(rng.choice(len(ordered), size, replace=False))]


def minimum_clients(configured: int | None, cohort: int) -> int:
    """`rounds.min-clients`, by default half of the cohort, rounded up."""
    return configured if configured is not None else -(-cohort // 2)


@dataclass(frozen=True)
class Exchange:
    """One request to each of some clients; equal payloads are the same object."""

    stage: str  # "advertise", "share", "train", "sign" or "reveal"
    requests: Mapping[str, bytes]


class ServerRound(Protocol):
    """One round at the server: exchanges with clients, one after the other, then the result.

    For every request of an exchange there is either one `receive` or one `fail`; when nothing
    is pending, `proceed` gives the next exchange, or None after the last.
    """

    context: RoundContext
    cohort: Sequence[Member]
    failed: dict[str, str]
    bytes_up: int
    bytes_down: int  # counted by whoever sends
    train_seconds: float

    def begin(self, adapter: Float32Vector) -> Exchange:
        """The first exchange of the round that starts from `adapter`."""

    def proceed(self) -> Exchange | None:
        """The next exchange; raises `TooFewClients` if it cannot go on."""

    def receive(self, client: str, payload: bytes) -> None:
        """Take in an answer; after a `WireError` the client is still pending: say `fail`."""

    def fail(self, client: str, reason: str) -> None:
        """`client` does not answer this exchange any more."""

    @property
    def pending(self) -> list[str]:
        """Clients that neither answered the open exchange nor failed."""

    @property
    def counted(self) -> tuple[str, ...]:
        """Clients whose update is in the sum, ordered by name."""

    @property
    def train_loss(self) -> float | None:
        """Mean training loss, weighted by examples; None if nobody may tell."""

    def close(self, rule: Rule, state: GlobalState, minimum: int) -> GlobalState:
        """The next global state; raises `JobError`."""


@dataclass
class PlainRound:
    """A round in which the server sees every update: one exchange, each client counted once."""

    context: RoundContext
    cohort: Sequence[Member]
    updates: Updates
    by_examples: bool = True
    tells_losses: bool = True  # not under record-level privacy, where losses stay at home
    failed: dict[str, str] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    train_seconds: float = 0.0
    _losses: dict[str, tuple[float, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._places = {member.name: place for place, member in enumerate(self.cohort)}
        self._examples = {member.name: member.train_examples for member in self.cohort}
        self._sum = self.updates.sum(len(self.cohort))

    def begin(self, adapter: Float32Vector) -> Exchange:
        """See `ServerRound.begin`."""
        request = codec.encode_train_request(
            codec.TrainRequest(self.context, adapter.astype("<f4").tobytes())
        )
        return Exchange("train", dict.fromkeys(self._places, request))

    def proceed(self) -> Exchange | None:
        """See `ServerRound.proceed`."""
        return None

    def receive(self, client: str, payload: bytes) -> None:
        """See `ServerRound.receive`."""
        self._require_pending(client)
        reply = codec.decode_train_reply(payload, self.updates.encoded_bytes)
        check_context(reply.context, self.context)
        if reply.examples != self._examples[client]:
            # The weight was settled in the greeting; a client cannot grow its say in a round.
            raise MalformedMessage(
                f"{reply.examples} examples, but the greeting said {self._examples[client]}"
            )
        weight = reply.examples if self.by_examples else 1
        self._sum.add(self._places[client], reply.update, weight)
        self._losses[client] = (reply.loss, reply.examples)
        self.bytes_up += len(payload)
        self.train_seconds += reply.train_seconds

    def fail(self, client: str, reason: str) -> None:
        """See `ServerRound.fail`."""
        self._require_pending(client)
        self._sum.skip(self._places[client])
        self.failed[client] = reason

    @property
    def pending(self) -> list[str]:
        """See `ServerRound.pending`."""
        return [n for n in self._places if n not in self._losses and n not in self.failed]

    @property
    def counted(self) -> tuple[str, ...]:
        """See `ServerRound.counted`."""
        return tuple(sorted(self._losses))

    @property
    def train_loss(self) -> float | None:
        """See `ServerRound.train_loss`."""
        if not self.tells_losses:
            return None
        total = sum(examples for _, examples in self._losses.values())
        if not total:
            return None
        return sum(self._losses[n][0] * self._losses[n][1] for n in self.counted) / total

    def close(self, rule: Rule, state: GlobalState, minimum: int) -> GlobalState:
        """See `ServerRound.close`."""
        if self.pending:
            raise ValueError(f"clients are still pending: {', '.join(self.pending)}")
        if len(self._losses) < minimum:
            raise TooFewClients(
                f"round {self.context.round}: {len(self._losses)} of {len(self.cohort)} clients "
                f"are left, rounds.min-clients asks for {minimum} ({reasons(self.failed)})"
            )
        total, weight = self._sum.result()
        return next_state(rule, state, total, weight, self.context.round)

    def _require_pending(self, client: str) -> None:
        if client not in self._places:
            raise MalformedMessage(f"{client} is not in this round's cohort")
        if client in self._losses or client in self.failed:
            raise MalformedMessage(f"{client} has answered this round already")


def reasons(failed: Mapping[str, str]) -> str:
    """Who failed and why, in one line; those with the same reason together."""
    names: dict[str, list[str]] = {}
    for name, why in sorted(failed.items()):
        names.setdefault(why, []).append(name)
    return "; ".join(f"{_list(who)}: {why}" for why, who in names.items())


def _list(names: list[str]) -> str:
    if len(names) <= 3:
        return ", ".join(names)
    return f"{', '.join(names[:2])} and {len(names) - 2} more"


def next_state(
    rule: Rule,
    state: GlobalState,
    total: NDArray[np.float64],
    weight: float,
    round_number: int,
) -> GlobalState:
    """What `rule` makes of a weighted sum; raises `JobError` if it is not finite."""
    rule_state, adapter = rule.apply(state.rule_state, state.adapter, total, weight)
    if not np.isfinite(adapter).all():
        raise JobError(
            f"round {round_number}: the new adapter is not finite; "
            "lower aggregate.server-lr or train.lr"
        )
    return replace(state, adapter=adapter, rule_state=rule_state)
