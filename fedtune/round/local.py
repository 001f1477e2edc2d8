"""A client's own work: train from a global adapter, evaluate one. No messages here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from fedtune.config import Config
from fedtune.errors import ContextMismatch, MalformedMessage, TrainingError
from fedtune.round.personal import Personal
from fedtune.round.site import PrivatePart
from fedtune.round.terms import fisher_scale, record_release
from fedtune.train.batches import (
    client_rng,
    dropout_seed,
    learning_rate,
    plan_batches,
    rounding_rng,
)
from fedtune.train.private import RecordPrivacy
from fedtune.train.trainer import Dataset, Evaluation, LocalPlan, LocalResult, Trainer
from fedtune.types import Float32Vector, RoundContext
from fedtune.update.fisher import weigh

logger = logging.getLogger(__name__)
Encoded = TypeVar("Encoded")


def record_privacy(config: Config, examples: int) -> RecordPrivacy | None:
    """How a client with so many examples hides each of them; None where it need not."""
    if config.privacy.unit != "record":
        return None
    noise = record_release(config, examples, 1).noise_multiplier
    return RecordPrivacy(noise, config.privacy.example_clip)


@dataclass(frozen=True)
class LocalUpdate:
    """Trained minus received (float32, manifest order); with rule "fisher", see `update.fisher`.

    Mean loss and seconds are 0 under differential privacy: a loss has no noise, and from the
    time one can tell how many examples were drawn.

    `private` is for the site's memory, where it must be when the update leaves, and for nobody
    else.
    """

    update: Float32Vector = field(repr=False)
    loss: float
    seconds: float
    private: PrivatePart | None = field(default=None, repr=False)


class LocalWork:
    """One client's data and trainer, under one configuration."""

    def __init__(
        self,
        name: str,
        config: Config,
        trainer: Trainer,
        train_data: Dataset,
        test_data: Dataset | None,
        personal: Personal | None = None,
    ) -> None:
        """`personal` is of the trainer's whole adapter; None: all of it is shared."""
        self.name = name
        self.config = config
        self.manifest = personal.parts.shared if personal else trainer.manifest
        self.base_digest = trainer.base_digest
        self._trainer = trainer
        self._personal = personal
        self.train_data = train_data
        self.test_data = test_data

    @property
    def train_examples(self) -> int:
        """Rows to train on."""
        return len(self.train_data)

    @property
    def test_examples(self) -> int:
        """Rows to evaluate on."""
        return len(self.test_data) if self.test_data is not None else 0

    @property
    def values_sent(self) -> int:
        """Length of an update as it travels."""
        return self.config.values_sent(self.manifest.size)

    @property
    def adapter_bytes(self) -> int:
        """Length of a global adapter on the wire."""
        return self.manifest.size * 4

    def context(self, run_id: str, round_number: int) -> RoundContext:
        """What a message of that run and round must be about."""
        return RoundContext(
            run_id=run_id,
            round=round_number,
            base_digest=self.base_digest,
            manifest_digest=self.manifest.digest,
            config_digest=self.config.digest,
        )

    def check_round(self, round_number: int) -> None:
        """Raise `ContextMismatch` for a round that the configuration does not have."""
        if not 1 <= round_number <= self.config.rounds.count:
            raise ContextMismatch(
                f"round {round_number} of a run of {self.config.rounds.count} rounds"
            )

    def read_adapter(self, data: bytes) -> Float32Vector:
        """A global adapter from the wire; raises `MalformedMessage` if it is not finite."""
        vector = np.frombuffer(data, "<f4")
        if not np.isfinite(vector).all():
            raise MalformedMessage("the global adapter has values that are not finite")
        return vector.astype(np.float32)

    def train(self, adapter: Float32Vector, run_id: str, round_number: int) -> LocalUpdate:
        """Train from `adapter`; raises `TrainingError` when training fails."""
        rows = len(self.train_data)
        if not rows:
            raise TrainingError("this client has no training examples")
        train, rounds = self.config.train, self.config.rounds
        lr = learning_rate(
            train.schedule, train.lr, train.final_lr_fraction, round_number - 1, rounds.count
        )
        rng = client_rng(self.config.seed, round_number, self.name)
        batches = plan_batches(self.train_data.lengths, train.steps, train.batch_size, rng)
        plan = LocalPlan(
            batches,
            (lr for _ in range(train.steps)),
            dropout_seed(rng),
            train.batch_size,
            fisher=self.config.aggregate.rule == "fisher",
            proximal=train.proximal,
        )
        result, private = self._trained(adapter, plan, run_id, round_number)
        update = result.adapter - adapter
        if not np.isfinite(update).all():
            raise TrainingError("training gave values that are not finite; lower train.lr")
        if plan.fisher:
            if result.fisher is None:
                raise TrainingError("the trainer gives no Fisher information")
            scale = fisher_scale(self.config, self.manifest.size)
            update = weigh(update, result.fisher, self.config.aggregate.fisher_damping, scale)
        if self.config.privacy.unit != "none":
            return LocalUpdate(update, 0.0, 0.0, private)
        return LocalUpdate(update, result.loss or 0.0, result.seconds, private)

    def _trained(
        self, adapter: Float32Vector, plan: LocalPlan, run_id: str, round_number: int
    ) -> tuple[LocalResult, PrivatePart | None]:
        """What training makes of the part that travels, and of the client's own."""
        own = self._personal
        if own is None:
            return self._trainer.train(adapter, self.train_data, plan), None
        before = own.before(run_id, round_number)
        result = self._trainer.train(own.parts.join(adapter, before), self.train_data, plan)
        if not np.isfinite(result.adapter).all():
            raise TrainingError("training gave values that are not finite; lower train.lr")
        return own.divide(result, run_id, round_number, before)

    def train_and(
        self,
        encode: Callable[[LocalUpdate], Encoded],
        adapter: Float32Vector,
        run_id: str,
        round_number: int,
        tells_failures: bool,
    ) -> Encoded:
        """What `encode` makes of the update from `adapter`; if either fails, of one of zeros.

        An adapter can be made so that training fails if, and only if, some example is of a kind:
        whether it failed is an answer without masks and without noise. So the failure is logged
        at home only, unless the site `tells_failures`; then it is raised.
        """
        if tells_failures:
            return encode(self.train(adapter, run_id, round_number))
        try:
            return encode(self.train(adapter, run_id, round_number))
        except Exception:
            logger.exception(
                "%s: training failed in round %d; the server gets an update of zeros. To let it "
                "know, set report-failures = true in [policy]",
                self.name,
                round_number,
            )
        return encode(LocalUpdate(np.zeros(self.values_sent, np.float32), 0.0, 0.0))

    def rounding(self, round_number: int) -> np.random.Generator:
        """Decides in which direction this round's values are rounded; not secret."""
        return rounding_rng(self.config.seed, round_number, self.name)

    def evaluate(self, adapter: Float32Vector, run_id: str, round_number: int) -> Evaluation:
        """Evaluate what a round ended with, with the client's private part, on its own test set.

        Raises `TrainingError` if there is none.
        """
        if self.test_data is None:
            raise TrainingError("this client has no test set to evaluate on")
        if self._personal is not None:
            own = self._personal.before(run_id, round_number + 1)
            adapter = self._personal.parts.join(adapter, own)
        return self._trainer.evaluate(adapter, self.test_data)
