"""The client's half of a round: bytes in, bytes out, and nothing is remembered between rounds."""

from __future__ import annotations

import numpy as np

from fedtune.config import Config
from fedtune.errors import ContextMismatch, MalformedMessage, TrainingError
from fedtune.train.batches import client_rng, dropout_seed, learning_rate, plan_batches
from fedtune.train.trainer import Dataset, LocalPlan, Trainer
from fedtune.types import Float32Vector, RoundContext
from fedtune.update import UpdatePipeline
from fedtune.wire import codec
from fedtune.wire.context import check_context


class ClientMachine:
    """One client of one run: it says hello, trains, evaluates.

    It trains only for the base model, manifest and configuration that it knows itself; a
    request for any other is refused with `ContextMismatch`.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        trainer: Trainer,
        train_data: Dataset,
        test_data: Dataset | None,
        pipeline: UpdatePipeline,
    ) -> None:
        self.name = name
        self._config = config
        self._trainer = trainer
        self._train_data = train_data
        self._test_data = test_data
        self._pipeline = pipeline

    def hello(self, payload: bytes) -> bytes:
        """Answer who this is: name, example counts, and the digests agreed upon."""
        run_id = codec.decode_hello_request(payload)
        tests = len(self._test_data) if self._test_data is not None else 0
        context = self._context(run_id, 0)
        return codec.encode_hello(codec.Hello(context, self.name, len(self._train_data), tests))

    def train(self, payload: bytes) -> bytes:
        """Answer a request to train.

        Raises `WireError` for a request that is not acceptable, `TrainingError` when training
        fails.
        """
        request = codec.decode_train_request(payload, self._adapter_bytes)
        adapter = self._accept(request)
        result = self._trainer.train(
            adapter, self._train_data, self._plan(request.context.round, len(self._train_data))
        )
        update = result.adapter - adapter
        return codec.encode_train_reply(
            codec.TrainReply(
                context=request.context,
                update=self._pipeline.encode(update),
                examples=len(self._train_data),
                loss=result.loss,
                train_seconds=result.seconds,
            )
        )

    def evaluate(self, payload: bytes) -> bytes:
        """Answer a request to evaluate on the client's own test set."""
        request = codec.decode_evaluate_request(payload, self._adapter_bytes)
        adapter = self._accept(request)
        if self._test_data is None:
            raise TrainingError("this client has no test set to evaluate on")
        result = self._trainer.evaluate(adapter, self._test_data)
        return codec.encode_evaluate_reply(
            codec.EvaluateReply(request.context, result.examples, result.correct, result.loss_sum)
        )

    @property
    def _adapter_bytes(self) -> int:
        return self._trainer.manifest.size * 4

    def _context(self, run_id: str, round_number: int) -> RoundContext:
        return RoundContext(
            run_id=run_id,
            round=round_number,
            base_digest=self._trainer.base_digest,
            manifest_digest=self._trainer.manifest.digest,
            config_digest=self._config.digest,
        )

    def _accept(self, request: codec.AdapterRequest) -> Float32Vector:
        check_context(request.context, self._context(request.context.run_id, request.context.round))
        if not 1 <= request.context.round <= self._config.rounds.count:
            raise ContextMismatch(
                f"round {request.context.round} of a run of {self._config.rounds.count} rounds"
            )
        vector = np.frombuffer(request.adapter, "<f4")
        if not np.isfinite(vector).all():
            raise MalformedMessage("the global adapter has values that are not finite")
        return vector.astype(np.float32)

    def _plan(self, round_number: int, rows: int) -> LocalPlan:
        if not rows:
            raise TrainingError("this client has no training examples")
        train, rounds = self._config.train, self._config.rounds
        lr = learning_rate(
            train.schedule, train.lr, train.final_lr_fraction, round_number - 1, rounds.count
        )
        rng = client_rng(self._config.seed, round_number, self.name)
        batches = plan_batches(self._train_data.lengths, train.steps, train.batch_size, rng)
        return LocalPlan(batches, (lr for _ in range(train.steps)), dropout_seed(rng))
