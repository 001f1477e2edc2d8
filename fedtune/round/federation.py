"""A federation at the server: rounds follow each other, each committed before the next."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedtune.aggregate import AdamRule, MomentumRule, Rule
from fedtune.config import Aggregate, Config
from fedtune.errors import ContextMismatch, TooFewClients
from fedtune.records import RoundRecord
from fedtune.round.journal import Journal
from fedtune.round.server import Member, ServerRound, draw_cohort, minimum_clients
from fedtune.types import Float32Vector, Manifest, RoundContext
from fedtune.update import make_pipeline
from fedtune.wire import codec
from fedtune.wire.context import check_context


@dataclass(frozen=True)
class Score:
    """What an evaluation of the global adapter found."""

    loss: float
    accuracy: float | None


def make_rule(aggregate: Aggregate) -> Rule:
    """The rule that the configuration names."""
    if aggregate.server_optimizer == "adam":
        return AdamRule(
            aggregate.server_lr,
            aggregate.server_momentum,
            aggregate.server_beta2,
            aggregate.server_epsilon,
        )
    return MomentumRule(aggregate.server_lr, aggregate.server_momentum)


class Federation:
    """Opens rounds and commits them to the journal; goes on where the journal ends."""

    def __init__(
        self, config: Config, manifest: Manifest, base_digest: str, journal: Journal
    ) -> None:
        self.config = config
        self.manifest = manifest
        self.run_id = journal.identity()["run_id"]
        self._context = RoundContext(self.run_id, 0, base_digest, manifest.digest, config.digest)
        self._journal = journal
        self._rule = make_rule(config.aggregate)
        self._pipeline = make_pipeline(config.update, manifest.size)
        self.round, self._state = journal.last_state()
        self.members: list[Member] = []

    @property
    def adapter(self) -> Float32Vector:
        """The global adapter after the last committed round."""
        return self._state.adapter

    @property
    def rounds_left(self) -> int:
        """Rounds until the configured count."""
        return max(0, self.config.rounds.count - self.round)

    def admit(self, payload: bytes) -> Member:
        """Take in a client by its greeting.

        Raises `WireError` when it is malformed, when client and server do not agree on base
        model, adapter and configuration, or when the name is taken.
        """
        hello = codec.decode_hello(payload)
        check_context(hello.context, self._context)
        if any(member.name == hello.client for member in self.members):
            raise ContextMismatch(f"a client named {hello.client} is there already")
        if hello.train_examples == 0:
            raise ContextMismatch(f"{hello.client} has no training examples")
        member = Member(hello.client, hello.train_examples, hello.test_examples)
        self.members.append(member)
        return member

    def open_round(self) -> ServerRound:
        """The next round, with its cohort drawn."""
        rounds = self.config.rounds
        number = self.round + 1
        cohort = draw_cohort(self.members, rounds.clients_per_round, self.config.seed, number)
        if len(cohort) < (minimum := max(1, self._minimum(len(cohort)))):
            raise TooFewClients(
                f"round {number}: {len(cohort)} clients are there, "
                f"rounds.min-clients asks for {minimum}"
            )
        return ServerRound(
            replace(self._context, round=number),
            cohort,
            self._pipeline,
            self.manifest.size,
            by_examples=self.config.aggregate.weighting == "examples",
        )

    def close_round(self, server_round: ServerRound) -> Float32Vector:
        """The next global adapter, not yet committed; raises `TooFewClients`."""
        minimum = self._minimum(len(server_round.cohort))
        self._next = server_round.close(self._rule, self._state, minimum)
        return self._next.adapter

    def commit(
        self, server_round: ServerRound, score: Score | None, bytes_down: int, seconds: float
    ) -> RoundRecord:
        """Write the closed round to the journal; from here on it has happened."""
        record = RoundRecord(
            round=server_round.context.round,
            train_loss=server_round.train_loss,
            loss=score.loss if score else None,
            accuracy=score.accuracy if score else None,
            clients=server_round.counted,
            failed=dict(sorted(server_round.failed.items())),
            bytes_up=server_round.bytes_up,
            bytes_down=bytes_down,
            seconds=seconds,
            train_seconds=server_round.train_seconds,
        )
        self._journal.commit(record, self._next)
        self.round, self._state = record.round, self._next
        return record

    def evaluates(self, round_number: int) -> bool:
        """Whether the adapter is evaluated after this round."""
        every, last = self.config.rounds.evaluate_every, self.config.rounds.count
        return round_number == last or (every > 0 and round_number % every == 0)

    def _minimum(self, cohort: int) -> int:
        return minimum_clients(self.config.rounds.min_clients, cohort)
