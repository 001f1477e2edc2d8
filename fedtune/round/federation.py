"""A federation at the server: rounds follow each other, each committed before the next."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedtune.aggregate import AdamRule, FisherRule, MomentumRule, Rule
from fedtune.config import Aggregate, Config
from fedtune.errors import BudgetExceeded, ContextMismatch, JobError, TooFewClients
from fedtune.privacy.accountant import Release
from fedtune.records import RoundRecord
from fedtune.round.journal import Journal
from fedtune.round.masked import Authority, MaskedRound
from fedtune.round.server import (
    Exchange,
    Member,
    PlainRound,
    ServerRound,
    draw_cohort,
    minimum_clients,
)
from fedtune.round.terms import client_release, fisher_scale, make_quantizer, make_terms
from fedtune.round.updates import FloatUpdates, IntegerUpdates, Updates
from fedtune.types import Float32Vector, Manifest, RoundContext
from fedtune.update import make_pipeline
from fedtune.wire import codec
from fedtune.wire.context import check_context

LOST_IN_A_ROW = 3


@dataclass(frozen=True)
class Score:
    """What an evaluation of the global adapter found."""

    loss: float
    accuracy: float | None


def make_rule(config: Config, size: int) -> Rule:
    """The rule that the configuration names, for an adapter of `size` values."""
    optimizer = _optimizer(config.aggregate)
    if config.aggregate.rule == "fisher":
        return FisherRule(optimizer, fisher_scale(config, size), config.update.clip)
    return optimizer


def _optimizer(aggregate: Aggregate) -> Rule:
    if aggregate.server_optimizer == "adam":
        return AdamRule(
            aggregate.server_lr,
            aggregate.server_momentum,
            aggregate.server_beta2,
            aggregate.server_epsilon,
        )
    return MomentumRule(aggregate.server_lr, aggregate.server_momentum)


def epsilon_of_sums(config: Config, journal: Journal) -> float | None:
    """Unit "client": what the sums of this run have spent; None for other units."""
    if config.privacy.unit != "client":
        return None  # what records spend, each site accounts for itself
    return journal.ledger().epsilon(config.privacy.delta)


class Federation:
    """Opens rounds and commits them to the journal; goes on where the journal ends."""

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        base_digest: str,
        journal: Journal,
        authority: Authority | None = None,
    ) -> None:
        """`authority` is needed for secure aggregation."""
        self.config = config
        self._authority = authority
        self.manifest = manifest
        self.run_id = journal.identity()["run_id"]
        self._context = RoundContext(self.run_id, 0, base_digest, manifest.digest, config.digest)
        self._journal = journal
        self._rule = make_rule(config, manifest.size)
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
        if self._authority is not None and hello.client not in self._authority.roster.keys:
            raise ContextMismatch(f"{hello.client} is not in the roster")
        if hello.train_examples == 0 and not self.config.secagg.enabled:
            raise ContextMismatch(f"{hello.client} has no training examples")
        member = Member(hello.client, hello.train_examples, hello.test_examples)
        self.members.append(member)
        return member

    def dismiss(self, name: str) -> None:
        """A client has left; it may be taken in again."""
        self.members = [member for member in self.members if member.name != name]

    def fewest_to_begin(self, clients: int) -> int:
        """How many of `clients` it takes for a round that can end."""
        wanted = min(clients, self.config.rounds.clients_per_round or clients)
        if self._authority is None:
            return max(1, minimum_clients(self.config.rounds.min_clients, wanted))
        terms = make_terms(self.config, self._authority.roster.clients)
        return next((n for n in range(1, wanted) if terms.protects(n)), wanted)

    def open_round(self) -> tuple[ServerRound, Exchange]:
        """The next round with its cohort drawn, and its first exchange.

        Raises `TooFewClients`, and `BudgetExceeded` before anybody is asked anything.
        """
        number = self.round + 1
        size = self.config.rounds.clients_per_round
        cohort = draw_cohort(self.members, size, self.config.seed, number)
        if len(cohort) < (minimum := max(1, self._minimum(len(cohort)))):
            raise TooFewClients(
                f"round {number}: {len(cohort)} clients are there, "
                f"rounds.min-clients asks for {minimum}"
            )
        context = replace(self._context, round=number)
        if self._authority is not None:
            return self._open_masked(context, cohort, self._authority)
        opened = PlainRound(
            context,
            cohort,
            self._updates(),
            by_examples=self.config.aggregate.weighting == "examples",
            tells_losses=self.config.privacy.unit == "none",
        )
        return opened, opened.begin(self.adapter)

    def _updates(self) -> Updates:
        config, size = self.config, self._values_sent
        if config.update.bits is None:
            return FloatUpdates(make_pipeline(config.update, size), config.aggregate.rule)
        return IntegerUpdates(make_quantizer(config, size, 1))

    def _open_masked(
        self, context: RoundContext, cohort: list[Member], authority: Authority
    ) -> tuple[ServerRound, Exchange]:
        sealed = self._journal.sealed(context.round)
        if sealed is None:
            self._check_budget(context.round)
        journal, number = self._journal, context.round
        repeated = journal.asked_for_values(number)
        opened = MaskedRound(
            context,
            cohort,
            self.config,
            self._values_sent,
            sealed[0] if sealed else journal.next_attempt(number),
            authority,
            ask=lambda: journal.ask_for_values(number),
            seal=lambda notes: journal.seal(number, notes, self._release(number)),
            repeated=repeated,
        )
        return opened, opened.resume(sealed[1]) if sealed else opened.begin(self.adapter)

    def _release(self, round_number: int) -> Release | None:
        if self.config.privacy.unit != "client":
            return None
        return client_release(self.config, self._values_sent, round_number)

    def _check_budget(self, round_number: int) -> None:
        release, privacy = self._release(round_number), self.config.privacy
        if release is None or privacy.epsilon is None:
            return
        spent = self._journal.ledger().epsilon_with(release, privacy.delta)
        if spent > privacy.epsilon:
            raise BudgetExceeded(
                f"round {round_number} would bring epsilon to {spent:.3f} at delta "
                f"{privacy.delta:g}, above privacy.epsilon = {privacy.epsilon:g}; "
                "what was trained so far is kept"
            )

    @property
    def epsilon(self) -> float | None:
        """See `epsilon_of_sums`."""
        return epsilon_of_sums(self.config, self._journal)

    def close_round(self, server_round: ServerRound) -> Float32Vector:
        """The next global adapter, not yet committed; raises `TooFewClients`."""
        minimum = self._minimum(len(server_round.cohort))
        self._next = server_round.close(self._rule, self._state, minimum)
        return self._next.adapter

    def give_up(self, reason: str) -> Float32Vector:
        """The open round comes to nothing, and the adapter stays; the next round can begin.

        Raises `JobError` at the third such round in a row.
        """
        before = self._journal.records()[-(LOST_IN_A_ROW - 1) :]
        if len(before) == LOST_IN_A_ROW - 1 and not any(record.clients for record in before):
            raise JobError(f"{LOST_IN_A_ROW} rounds in a row came to nothing; the last: {reason}")
        self._next = self._state
        return self.adapter

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
            failed={
                name: reason
                for name, reason in sorted(server_round.failed.items())
                if name not in server_round.counted
            },
            bytes_up=server_round.bytes_up,
            bytes_down=bytes_down,
            seconds=seconds,
            train_seconds=server_round.train_seconds,
            late={
                name: reason
                for name, reason in sorted(server_round.failed.items())
                if name in server_round.counted
            },
        )
        self._journal.commit(record, self._next)
        self.round, self._state = record.round, self._next
        return record

    def evaluates(self, round_number: int) -> bool:
        """Whether the adapter is evaluated after this round."""
        every, last = self.config.rounds.evaluate_every, self.config.rounds.count
        return round_number == last or (every > 0 and round_number % every == 0)

    @property
    def _values_sent(self) -> int:
        return self.config.values_sent(self.manifest.size)

    def _minimum(self, cohort: int) -> int:
        if self._authority is not None:
            return make_terms(self.config, self._authority.roster.clients).minimum
        return minimum_clients(self.config.rounds.min_clients, cohort)
