"""The client's machine: what it refuses and what it answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedtune.errors import ContextMismatch, MalformedMessage, TrainingError
from fedtune.types import RoundContext
from fedtune.wire import codec


def _context(small, **changes: object) -> RoundContext:
    context = RoundContext("run", 1, "ab" * 32, small.attached.manifest.digest, small.config.digest)
    return replace(context, **changes)


def _adapter(small, value: float = 0.5) -> np.ndarray:
    return np.full(small.attached.manifest.size, value, np.float32)


def _train(small, adapter: np.ndarray, place: int = 0, **changes: object) -> codec.TrainReply:
    request = codec.TrainRequest(_context(small, **changes), adapter.astype("<f4").tobytes())
    payload = small.machines[place].train(codec.encode_train_request(request))
    return codec.decode_train_reply(payload, adapter.size * 4)


def _evaluate(small, adapter: np.ndarray, **changes: object) -> codec.EvaluateReply:
    request = codec.EvaluateRequest(_context(small, **changes), adapter.astype("<f4").tobytes())
    payload = small.machines[0].evaluate(codec.encode_evaluate_request(request))
    return codec.decode_evaluate_reply(payload)


def test_hello_says_who_it_is_and_what_it_agrees_to(small_federation):
    small = small_federation(sizes=(7, 12), tests=6)
    hello = codec.decode_hello(small.machines[1].hello(codec.encode_hello_request("study")))
    context = _context(small, run_id="study", round=0)
    assert hello == codec.Hello(context, "client-1", 12, 6)
    alone = small_federation(tests=0).machines[0]
    assert codec.decode_hello(alone.hello(codec.encode_hello_request("s"))).test_examples == 0


@pytest.mark.parametrize("answer", [_train, _evaluate])
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"base_digest": "cd" * 32}, "base"),
        ({"manifest_digest": "cd" * 32}, "manifest"),
        ({"config_digest": "cd" * 32}, "config"),
        ({"round": 0}, "round 0"),
        ({"round": 4}, "round 4"),
        ({"round": 2**32 - 1}, "round"),
    ],
)
def test_another_context_is_refused(small_federation, answer, change, word):
    small = small_federation()
    with pytest.raises(ContextMismatch, match=word):
        answer(small, _adapter(small), **change)
    assert np.array_equal(small.attached.read(), small_federation().attached.read())


@pytest.mark.parametrize("number", [1, 3])
def test_the_first_and_the_last_round_are_accepted(small_federation, number):
    small = small_federation()
    assert _train(small, _adapter(small), round=number).context.round == number


@pytest.mark.parametrize("answer", [_train, _evaluate])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_adapter_that_is_not_finite_is_refused(small_federation, answer, value):
    small = small_federation()
    adapter = _adapter(small)
    adapter[3] = value
    with pytest.raises(MalformedMessage, match="finite"):
        answer(small, adapter)


def test_an_adapter_of_another_length_is_refused(small_federation):
    small = small_federation()
    for wrong in (_adapter(small)[:-1], np.append(_adapter(small), np.float32(0))):
        with pytest.raises(MalformedMessage, match="adapter"):
            _train(small, wrong)


def test_the_update_is_trained_minus_received(small_federation):
    from fedtune.train.batches import client_rng, plan_batches
    from fedtune.train.trainer import LocalPlan

    small = small_federation("train.schedule=linear", "train.final-lr-fraction=0.5")
    start = _adapter(small, 0.3)
    reply = _train(small, start, place=1, round=2)
    rows = small.machines[1]._local.train_data
    rng = client_rng(0, 2, "client-1")
    # Round 2 of 3, from 0.05 to 0.025: half-way down.
    plan = LocalPlan(plan_batches(rows.lengths, 3, 4, rng), iter([0.0375] * 3), seed=0)
    result = small.trainer.train(start, rows, plan)
    assert np.array_equal(np.frombuffer(reply.update, "<f4"), result.adapter - start)
    assert reply.loss == result.loss
    assert reply.examples == 12


def test_nothing_is_remembered_between_rounds(small_federation):
    small = small_federation()
    first = _train(small, _adapter(small), round=2)
    _train(small, _adapter(small, -1.0), round=1)
    _train(small, _adapter(small, 2.0), place=2, round=3)
    again = _train(small, _adapter(small), round=2)
    assert again.update == first.update
    assert again.loss == first.loss
    assert _train(small, _adapter(small), round=3).update != first.update


def test_evaluation_counts_the_own_test_set(small_federation):
    small = small_federation(tests=9)
    adapter = np.random.default_rng(0).normal(size=small.attached.manifest.size)
    reply = _evaluate(small, adapter.astype(np.float32))
    expected = small.trainer.evaluate(
        adapter.astype(np.float32), small.machines[0]._local.test_data
    )
    assert reply.examples == expected.examples == 9
    assert reply.correct == expected.correct
    assert reply.loss_sum == expected.loss_sum


def test_without_rows_there_is_no_answer(small_federation):
    small = small_federation(sizes=(0, 3), tests=0)
    with pytest.raises(TrainingError, match="no training examples"):
        _train(small, _adapter(small))
    with pytest.raises(TrainingError, match="test set"):
        _evaluate(small, _adapter(small))


def test_updates_can_leave_in_half_precision(small_federation):
    full = small_federation()
    half = small_federation("update.compress=float16")
    start = _adapter(full, 0.3)
    exact = np.frombuffer(_train(full, start).update, "<f4")
    request = codec.TrainRequest(_context(half), start.tobytes())
    payload = half.machines[0].train(codec.encode_train_request(request))
    update = np.frombuffer(codec.decode_train_reply(payload, 2 * start.size).update, "<f2")
    assert np.array_equal(update, exact.astype(np.float16))
