"""A federation: who is admitted, what a run adds up to, how it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.errors import ContextMismatch, MalformedMessage, TooFewClients
from fedtune.round.federation import Federation, Score
from fedtune.round.journal import Journal
from fedtune.round.server import GlobalState
from fedtune.wire import codec


def _open(small: Any, path: Path) -> tuple[Federation, Journal]:
    """A federation over a journal that is made or continued; all clients have said hello."""
    if path.exists():
        journal = Journal.open(path)
    else:
        start = np.random.default_rng(0).normal(size=small.attached.manifest.size)
        state = GlobalState((start / 4).astype(np.float32), {})
        if small.config.aggregate.server_momentum:
            state = GlobalState(state.adapter, {"velocity": np.zeros(start.size)})
        journal = Journal.create(path, {"run_id": "run"}, state)
    federation = Federation(small.config, small.attached.manifest, "ab" * 32, journal)
    for machine in small.machines:
        federation.admit(machine.hello(codec.encode_hello_request("run")))
    return federation, journal


def _one_round(federation: Federation, small: Any, order: int = 1) -> Any:
    machines = {machine.name: machine for machine in small.machines}
    opened, exchange = federation.open_round()
    for name, request in list(exchange.requests.items())[::order]:
        opened.receive(name, machines[name].train(request))
    federation.close_round(opened)
    return federation.commit(opened, Score(1.0, 0.5), 100, 0.5)


def test_a_round_by_hand(small_federation, tmp_path):
    small = small_federation(sizes=(7, 12, 5))
    federation, journal = _open(small, tmp_path / "j.sqlite")
    start = federation.adapter
    record = _one_round(federation, small)
    context = codec.RoundContext(
        "run", 1, "ab" * 32, small.attached.manifest.digest, small.config.digest
    )
    request = codec.encode_train_request(codec.TrainRequest(context, start.tobytes()))
    replies = [
        codec.decode_train_reply(machine.train(request), start.nbytes) for machine in small.machines
    ]
    updates = [np.frombuffer(reply.update, "<f4") for reply in replies]
    expected = start + np.average(np.array(updates, np.float64), axis=0, weights=[7, 12, 5])
    assert np.abs(federation.adapter - expected).max() < 1e-7
    losses = [reply.loss for reply in replies]
    assert record.train_loss == pytest.approx(np.average(losses, weights=[7, 12, 5]))
    assert record.clients == ("client-0", "client-1", "client-2")
    assert (record.round, record.bytes_down, federation.rounds_left) == (1, 100, 2)
    journal.close()


@pytest.mark.parametrize("overrides", [(), ("aggregate.server-momentum=0.9",)])
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(small_federation, tmp_path, overrides):
    small = small_federation("rounds.clients-per-round=2", *overrides)
    whole, journal = _open(small, tmp_path / "whole.sqlite")
    for _ in range(3):
        _one_round(whole, small)
    journal.close()
    for order in (-1, 1, -1):  # each round in a federation of its own, in another order
        part, journal = _open(small, tmp_path / "parts.sqlite")
        _one_round(part, small, order)
        journal.close()
    assert part.round == 3
    assert part.rounds_left == 0
    assert part.adapter.tobytes() == whole.adapter.tobytes()


def test_a_round_that_was_not_committed_has_not_happened(small_federation, tmp_path):
    small = small_federation()
    federation, journal = _open(small, tmp_path / "j.sqlite")
    before = federation.adapter.copy()
    opened, exchange = federation.open_round()
    for member, machine in zip(opened.cohort, small.machines, strict=True):
        opened.receive(member.name, machine.train(exchange.requests[member.name]))
    closed = federation.close_round(opened)
    assert not np.array_equal(closed, before)
    assert np.array_equal(federation.adapter, before)
    assert federation.open_round()[0].context.round == 1
    assert journal.last_state()[0] == 0
    journal.close()


def test_who_is_not_admitted(small_federation, tmp_path):
    small = small_federation(sizes=(7, 12))
    federation, journal = _open(small, tmp_path / "j.sqlite")
    question = codec.encode_hello_request("run")
    with pytest.raises(ContextMismatch, match="client-0"):
        federation.admit(small.machines[0].hello(question))
    with pytest.raises(ContextMismatch, match="run"):
        federation.admit(small.machines[0].hello(codec.encode_hello_request("other")))
    other = small_federation("train.lr=0.1").machines[0]
    with pytest.raises(ContextMismatch, match="config"):
        federation.admit(other.hello(question))
    empty = small_federation(sizes=(0,)).machines[0]
    empty.name = "empty"
    with pytest.raises(ContextMismatch, match="empty"):
        federation.admit(empty.hello(question))
    with pytest.raises(MalformedMessage):
        federation.admit(question)
    assert [m.name for m in federation.members] == ["client-0", "client-1"]
    assert [m.train_examples for m in federation.members] == [7, 12]
    journal.close()


def test_too_few_clients_for_a_round(small_federation, tmp_path):
    small = small_federation("rounds.min-clients=4", sizes=(7, 12))
    federation, journal = _open(small, tmp_path / "j.sqlite")
    with pytest.raises(TooFewClients, match="min-clients"):
        federation.open_round()
    journal.close()


def test_too_few_answers_for_a_round(small_federation, tmp_path):
    small = small_federation(sizes=(7, 12, 5))  # half of three, rounded up: two
    federation, journal = _open(small, tmp_path / "j.sqlite")
    opened, exchange = federation.open_round()
    opened.receive("client-1", small.machines[1].train(exchange.requests["client-1"]))
    for name in opened.pending:
        opened.fail(name, "lost")
    with pytest.raises(TooFewClients, match="lost"):
        federation.close_round(opened)
    journal.close()


def test_a_round_without_any_client_is_not_opened(small_federation, tmp_path):
    federation, journal = _open(small_federation(sizes=()), tmp_path / "j.sqlite")
    try:
        with pytest.raises(TooFewClients):
            federation.open_round()
    finally:
        journal.close()


@pytest.mark.parametrize(
    ("every", "evaluated"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (0, [5]), (9, [5])]
)
def test_when_it_evaluates(small_federation, tmp_path, every, evaluated):
    small = small_federation("rounds.count=5", f"rounds.evaluate-every={every}")
    federation, journal = _open(small, tmp_path / "j.sqlite")
    assert [n for n in range(1, 6) if federation.evaluates(n)] == evaluated
    journal.close()


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_weighting_follows_the_configuration(small_federation, tmp_path, weighting):
    small = small_federation(f"aggregate.weighting={weighting}", sizes=(3, 9))
    federation, journal = _open(small, tmp_path / "j.sqlite")
    start = federation.adapter
    opened, _ = federation.open_round()
    for name, examples, value in (("client-0", 3, 1.0), ("client-1", 9, 2.0)):
        update = np.full(start.size, value, "<f4").tobytes()
        reply = codec.TrainReply(opened.context, update, examples, 0.0, 0.0)
        opened.receive(name, codec.encode_train_reply(reply))
    step = federation.close_round(opened) - start
    assert step == pytest.approx(1.75 if weighting == "examples" else 1.5, abs=1e-6)
    journal.close()
