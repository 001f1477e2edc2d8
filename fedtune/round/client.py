"""The client's half of a round: bytes in, bytes out."""

from __future__ import annotations

from fedtune.adapter.parts import Parts
from fedtune.config import Config
from fedtune.errors import PolicyRefusal, ProtocolViolation
from fedtune.round.local import LocalUpdate, LocalWork
from fedtune.round.masked_client import MaskedClient
from fedtune.round.membership import Membership
from fedtune.round.personal import Personal
from fedtune.round.terms import make_quantizer, make_ring
from fedtune.train.trainer import Dataset, Trainer
from fedtune.types import Float32Vector
from fedtune.update import UpdatePipeline
from fedtune.wire import codec
from fedtune.wire.aggregation import cohort_limit
from fedtune.wire.context import check_context


class ClientMachine:
    """One client of one run: it says hello, trains, evaluates.

    It trains only for the base model, manifest and configuration that it knows itself; a
    request for any other is refused with `ContextMismatch`. With a `membership`, its site's
    policy comes before everything else.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        trainer: Trainer,
        train_data: Dataset,
        test_data: Dataset | None,
        pipeline: UpdatePipeline,
        membership: Membership | None = None,
        parts: Parts | None = None,
    ) -> None:
        """`parts` of the trainer's adapter, if some stay here, in the membership's memory."""
        personal = None
        if parts is not None:
            if membership is None:
                raise ValueError("a private part of the adapter needs a memory")
            personal = Personal(parts, membership.store, name)
        self.name = name
        self._config = config
        self._local = LocalWork(name, config, trainer, train_data, test_data, personal)
        self._pipeline = pipeline
        self._membership = membership
        self._masked = (
            MaskedClient(self._local, membership)
            if membership is not None and config.secagg.enabled
            else None
        )

    @property
    def local(self) -> LocalWork:
        """The client's data and trainer."""
        return self._local

    @property
    def largest_request(self) -> int:
        """Bytes that no acceptable request exceeds."""
        clients = self._membership.roster.clients if self._membership is not None else 0
        return self._local.adapter_bytes + max(cohort_limit(clients), codec.ENVELOPE_LIMIT) * 2

    def hello(self, payload: bytes) -> bytes:
        """Answer who this is: name, example counts, and the digests agreed upon.

        Counts that may not leave on their own are said to be 0.
        """
        run_id = codec.decode_hello_request(payload)
        self._check_policy()
        local = self._local
        train, test = local.train_examples, local.test_examples
        if self._masked is not None:
            train = 0
            test = test if self._shares_scores() else 0
        return codec.encode_hello(codec.Hello(local.context(run_id, 0), self.name, train, test))

    def converse(self, payload: bytes) -> bytes:
        """Answer a message of secure aggregation that asks for no training."""
        if self._masked is None:
            raise ProtocolViolation("nothing is masked in this federation")
        self._check_policy()
        return self._masked.converse(payload)

    def train(self, payload: bytes) -> bytes:
        """Answer a request to train.

        Raises `WireError` for a request that is not acceptable, `PolicyRefusal` for one that
        the site forbids, `TrainingError` when training fails.
        """
        self._check_policy()
        if self._masked is not None:
            return self._masked.train(payload)
        request = codec.decode_train_request(payload, self._local.adapter_bytes)
        adapter = self._accept(request)
        run_id, number, site = request.context.run_id, request.context.round, self._membership
        if site is not None and (charge := site.charge(self._local, run_id, number)):
            site.store.charge(self.name, run_id, charge)

        def encode(result: LocalUpdate) -> bytes:
            reply = codec.encode_train_reply(
                codec.TrainReply(
                    context=request.context,
                    update=self._encode(result, number),
                    examples=self._local.train_examples,
                    loss=result.loss,
                    train_seconds=result.seconds,
                )
            )
            if result.private is not None and site is not None:
                site.store.keep(self.name, result.private)
            return reply

        return self._local.train_and(encode, adapter, run_id, number, self._tells_failures())

    def evaluate(self, payload: bytes) -> bytes:
        """Answer a request to evaluate on the client's own test set."""
        request = codec.decode_evaluate_request(payload, self._local.adapter_bytes)
        adapter = self._accept(request)
        self._check_policy()
        if not self._shares_scores():
            raise PolicyRefusal(
                "a score of its own is neither masked nor noised, and this site's "
                "policy.share-metrics or the unit of privacy does not allow it"
            )
        context = request.context
        result = self._local.evaluate(adapter, context.run_id, context.round)
        return codec.encode_evaluate_reply(
            codec.EvaluateReply(request.context, result.examples, result.correct, result.loss_sum)
        )

    def _encode(self, result: LocalUpdate, round_number: int) -> bytes:
        """In the clear: as float vector, or as the integers of a cohort of one."""
        if self._config.update.bits is None:
            return self._pipeline.encode(result.update)
        quantizer = make_quantizer(self._config, self._local.values_sent, 1)
        examples, loss = self._local.train_examples, result.loss
        rng = self._local.rounding(round_number)
        ring = make_ring(quantizer, 1)
        return ring.pack(ring.lower(quantizer.encode(result.update, examples, loss, rng)))

    def _accept(self, request: codec.AdapterRequest) -> Float32Vector:
        context = request.context
        check_context(context, self._local.context(context.run_id, context.round))
        self._local.check_round(context.round)
        return self._local.read_adapter(request.adapter)

    def _check_policy(self) -> None:
        if self._membership is not None:
            self._membership.check(self._local)

    def _tells_failures(self) -> bool:
        """In the clear the server sees the update, which tells more, unless it has noise."""
        site = self._membership
        return site is None or self._config.privacy.unit == "none" or site.policy.report_failures

    def _shares_scores(self) -> bool:
        if self._config.privacy.unit == "client":
            return False  # test rows are data of the client, and a score has no noise
        return self._membership is None or self._membership.policy.share_metrics == "each"
