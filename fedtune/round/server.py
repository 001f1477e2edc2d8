"""The server's half of a round: who takes part, what arrives, what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedtune.aggregate import OrderedSum, Rule, RuleState
from fedtune.errors import JobError, MalformedMessage, TooFewClients
from fedtune.types import Float32Vector, RoundContext
from fedtune.update import UpdatePipeline
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


@dataclass
class ServerRound:
    """Collects the answers of one round's cohort; every client is counted once or failed once."""

    context: RoundContext
    cohort: Sequence[Member]
    pipeline: UpdatePipeline
    size: int
    by_examples: bool = True
    failed: dict[str, str] = field(default_factory=dict)
    bytes_up: int = 0
    train_seconds: float = 0.0
    _losses: dict[str, tuple[float, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._places = {member.name: place for place, member in enumerate(self.cohort)}
        self._examples = {member.name: member.train_examples for member in self.cohort}
        self._sum = OrderedSum(self.size, len(self.cohort))

    def request(self, adapter: Float32Vector) -> bytes:
        """The request to train that each client of the cohort gets."""
        return codec.encode_train_request(
            codec.TrainRequest(self.context, adapter.astype("<f4").tobytes())
        )

    def receive(self, client: str, payload: bytes) -> None:
        """Count the update of `client`; raises `WireError` if it is not acceptable.

        After an error the client is still pending: say `fail`.
        """
        self._require_pending(client)
        reply = codec.decode_train_reply(payload, self.pipeline.encoded_bytes)
        check_context(reply.context, self.context)
        if reply.examples != self._examples[client]:
            # The weight was settled in the greeting; a client cannot grow its say in a round.
            raise MalformedMessage(
                f"{reply.examples} examples, but the greeting said {self._examples[client]}"
            )
        update = self.pipeline.decode(reply.update)
        weight = reply.examples if self.by_examples else 1
        self._sum.add(self._places[client], update, weight)
        self._losses[client] = (reply.loss, reply.examples)
        self.bytes_up += len(payload)
        self.train_seconds += reply.train_seconds

    def fail(self, client: str, reason: str) -> None:
        """Leave `client` out of this round."""
        self._require_pending(client)
        self._sum.skip(self._places[client])
        self.failed[client] = reason

    @property
    def pending(self) -> list[str]:
        """Clients that neither answered nor failed."""
        return [n for n in self._places if n not in self._losses and n not in self.failed]

    @property
    def counted(self) -> tuple[str, ...]:
        """Clients whose update was counted, ordered by name."""
        return tuple(sorted(self._losses))

    @property
    def train_loss(self) -> float | None:
        """Mean training loss, weighted by examples; None if nobody was counted."""
        total = sum(examples for _, examples in self._losses.values())
        if not total:
            return None
        return sum(self._losses[n][0] * self._losses[n][1] for n in self.counted) / total

    def close(self, rule: Rule, state: GlobalState, minimum: int) -> GlobalState:
        """The next global state; raises `TooFewClients`, or `JobError` if it is not finite."""
        if self.pending:
            raise ValueError(f"clients are still pending: {', '.join(self.pending)}")
        if len(self._losses) < minimum:
            reasons = "; ".join(f"{name}: {why}" for name, why in sorted(self.failed.items()))
            raise TooFewClients(
                f"round {self.context.round}: {len(self._losses)} of {len(self.cohort)} clients "
                f"are left, rounds.min-clients asks for {minimum} ({reasons})"
            )
        rule_state, adapter = rule.apply(
            state.rule_state, state.adapter, self._sum.total, self._sum.weight
        )
        if not np.isfinite(adapter).all():
            raise JobError(
                f"round {self.context.round}: the new adapter is not finite; "
                "lower aggregate.server-lr or train.lr"
            )
        return replace(state, adapter=adapter, rule_state=rule_state)

    def _require_pending(self, client: str) -> None:
        if client not in self._places:
            raise MalformedMessage(f"{client} is not in this round's cohort")
        if client in self._losses or client in self.failed:
            raise MalformedMessage(f"{client} has answered this round already")
