"""Whole runs through Flower's own loop: a real trainer, a real journal, hostile networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Error, Message

from fedtune.errors import TooFewClients
from fedtune.flower.client_app import make_client_app
from fedtune.flower.envelope import CLIENT_FAILED, reply, unwrap
from fedtune.flower.grid import KIND, LocalGrid, message_handler
from fedtune.flower.observer import Observer
from fedtune.flower.pool import InlinePool
from fedtune.flower.strategy import FederatedFineTuning
from fedtune.records import RoundRecord
from fedtune.round.federation import Federation, Score
from fedtune.round.journal import Journal
from fedtune.round.server import GlobalState
from fedtune.wire import codec

Network = Callable[[list[Message], Iterator[Message]], Iterator[Message]]


@dataclass
class _Seen(Observer):
    """An observer that keeps what it is told."""

    committed: list[RoundRecord] = field(default_factory=list)
    refused: list[tuple[int, str]] = field(default_factory=list)
    progress: list[tuple[int, str, int, int]] = field(default_factory=list)

    failures: list[tuple[str, str]] = field(default_factory=list)

    def round_running(
        self, round_number: int, stage: str, waiting_for: Sequence[str], total: int
    ) -> None:
        self.progress.append((round_number, stage, total - len(waiting_for), total))

    def client_failed(self, name: str, failure: str) -> None:
        self.failures.append((name, failure))

    def round_committed(self, record: RoundRecord) -> None:
        self.committed.append(record)

    def client_refused(self, node: int, reason: str) -> None:
        self.refused.append((node, reason))


class _Grid(LocalGrid):
    """Our grid with a network in between that loses, repeats or changes answers."""

    network: Network | None = None

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        sent = list(messages)
        answers = super().send_and_receive(sent, timeout=timeout)
        return self.network(sent, answers) if self.network else answers


@dataclass
class _Run:
    federation: Federation
    seen: _Seen
    start: np.ndarray
    records: list[RoundRecord]


def _run(
    small: Any,
    folder: Path,
    network: Network | None = None,
    evaluate: Callable[[np.ndarray], Score] | None = None,
    clients: int | None = None,
) -> _Run:
    def machine(context: Context) -> Any:
        return small.machines[int(context.node_config["partition-id"])]

    clients = len(small.machines) if clients is None else clients
    app = make_client_app(machine)
    grid = _Grid(InlinePool({KIND: message_handler(app, clients)}), clients)
    grid.network = network
    start = np.linspace(-0.5, 0.5, small.attached.manifest.size, dtype=np.float32)
    journal = Journal.create(folder / "j.sqlite", {"run_id": "run"}, GlobalState(start, {}))
    federation = Federation(small.config, small.attached.manifest, "ab" * 32, journal)
    seen = _Seen()
    try:
        FederatedFineTuning(federation, seen, evaluate).run(grid, clients)
        return _Run(federation, seen, start, journal.records())
    finally:
        journal.close()


def _by_hand(
    small: Any, start: np.ndarray, places_of: Callable[[int], list[int]]
) -> list[np.ndarray]:
    """The adapters after each round, without Flower: only machines and a mean in float64."""
    adapter, adapters = start, []
    for number in range(1, small.config.rounds.count + 1):
        context = codec.RoundContext(
            "run", number, "ab" * 32, small.attached.manifest.digest, small.config.digest
        )
        request = codec.encode_train_request(codec.TrainRequest(context, adapter.tobytes()))
        places = places_of(number)
        replies = [
            codec.decode_train_reply(small.machines[place].train(request), start.nbytes)
            for place in places
        ]
        updates = np.array([np.frombuffer(r.update, "<f4") for r in replies], np.float64)
        weights = [small.examples[place] for place in places]
        adapter = (adapter + np.average(updates, axis=0, weights=weights)).astype(np.float32)
        adapters.append(adapter)
    return adapters


def _is_train(message: Message) -> bool:
    return message.metadata.message_type == "train"


def test_a_run_through_flower_is_the_run_by_hand(small_federation, tmp_path):
    small = small_federation()
    run = _run(small, tmp_path)
    expected = _by_hand(small, run.start, lambda _: [0, 1, 2])
    assert np.abs(run.federation.adapter - expected[-1]).max() < 1e-6
    assert np.abs(run.federation.adapter - run.start).max() > 0.01
    assert run.records == run.seen.committed
    assert [record.round for record in run.records] == [1, 2, 3]
    assert run.seen.progress == [
        (number, stage, done, 3)
        for number in (1, 2, 3)
        for stage in ("train", "evaluate")
        for done in range(4)
    ]
    assert run.seen.failures == []
    assert run.seen.refused == []
    # Each client's own test set of 6 rows, with the last adapter.
    parts = [small.trainer.evaluate(expected[-1], m._local.test_data) for m in small.machines]
    last = run.records[-1]
    assert last.loss == pytest.approx(sum(p.loss_sum for p in parts) / 18, rel=1e-4)
    assert last.accuracy == sum(p.correct for p in parts) / 18
    # 3 requests to train and 3 to evaluate, each an adapter in a small envelope.
    size = run.start.nbytes
    assert 6 * size < last.bytes_down < 6 * (size + 300)
    assert 3 * size < last.bytes_up < 3 * (size + 300) + 3 * 300


def test_clients_tests_of_a_language_model_give_a_loss_and_no_accuracy(small_federation, tmp_path):
    run = _run(small_federation("base.task=causal-lm"), tmp_path)
    assert all(record.loss > 0 and record.accuracy is None for record in run.records)


def test_the_server_evaluates_where_it_has_a_test_set(small_federation, tmp_path):
    small = small_federation("rounds.evaluate-every=2")
    adapters = []

    def evaluate(adapter: np.ndarray) -> Score:
        adapters.append(adapter.copy())
        return Score(float(len(adapters)), 0.25)

    run = _run(small, tmp_path, evaluate=evaluate)
    assert [(r.loss, r.accuracy) for r in run.records] == [(None, None), (1.0, 0.25), (2.0, 0.25)]
    assert np.array_equal(adapters[-1], run.federation.adapter)
    size = run.start.nbytes
    assert all(3 * size < r.bytes_down < 3 * (size + 300) for r in run.records)


def test_only_the_cohort_trains(small_federation, tmp_path):
    small = small_federation("rounds.clients-per-round=2", sizes=(7, 12, 5, 9))
    run = _run(small, tmp_path)
    drawn = {r.round: [int(name[-1]) for name in r.clients] for r in run.records}
    assert all(len(places) == 2 for places in drawn.values())
    expected = _by_hand(small, run.start, lambda number: drawn[number])
    assert np.abs(run.federation.adapter - expected[-1]).max() < 1e-6


def test_repeated_answers_are_counted_once(small_federation, tmp_path):
    def twice(_sent: list[Message], answers: Iterator[Message]) -> Iterator[Message]:
        for answer in answers:
            yield answer
            yield answer

    small = small_federation()
    run = _run(small, tmp_path, twice)
    expected = _by_hand(small, run.start, lambda _: [0, 1, 2])
    assert np.abs(run.federation.adapter - expected[-1]).max() < 1e-6
    assert all(record.failed == {} for record in run.records)


def _late(sent: list[Message], answers: Iterator[Message]) -> Iterator[Message]:
    """Client 1's answers arrive one round after they were asked for, and then instead."""
    for answer in answers:
        if _is_train(sent[0]) and answer.metadata.src_node_id == 3:
            yield from _late.held
            _late.held = [answer]
        else:
            yield answer


def test_late_answers_are_not_counted(small_federation, tmp_path):
    _late.held = []
    small = small_federation()
    run = _run(small, tmp_path, _late)
    expected = _by_hand(small, run.start, lambda _: [0, 2])
    assert np.abs(run.federation.adapter - expected[-1]).max() < 1e-6
    assert all(list(record.failed) == ["client-1"] for record in run.records)
    assert all("600 s" in record.failed["client-1"] for record in run.records)
    assert run.seen.failures == [("client-1", "late")] * 3


def _first_late_then_real(sent: list[Message], answers: Iterator[Message]) -> Iterator[Message]:
    """Client 1's answers are repeated one round later, just before the real ones."""
    for answer in answers:
        if _is_train(sent[0]) and answer.metadata.src_node_id == 3:
            yield from _first_late_then_real.held
            _first_late_then_real.held = [answer]
        yield answer


def test_a_late_answer_does_not_cost_the_real_one(small_federation, tmp_path):
    _first_late_then_real.held = []
    small = small_federation()
    run = _run(small, tmp_path, _first_late_then_real)
    expected = _by_hand(small, run.start, lambda _: [0, 1, 2])
    assert np.abs(run.federation.adapter - expected[-1]).max() < 1e-6


def _lost(kind: str, node: int) -> Network:
    def network(sent: list[Message], answers: Iterator[Message]) -> Iterator[Message]:
        for answer in answers:
            if sent[0].metadata.message_type != kind or answer.metadata.src_node_id != node:
                yield answer

    return network


def test_an_answer_that_is_lost_leaves_its_client_out(small_federation, tmp_path):
    small = small_federation()
    run = _run(small, tmp_path, _lost("train", 2))
    expected = _by_hand(small, run.start, lambda _: [1, 2])
    assert np.abs(run.federation.adapter - expected[-1]).max() < 1e-6
    assert all(list(record.failed) == ["client-0"] for record in run.records)


def test_evaluations_that_are_lost_leave_the_score_to_the_others(small_federation, tmp_path):
    small = small_federation("rounds.count=1")
    run = _run(small, tmp_path, _lost("evaluate", 2))
    parts = [
        small.trainer.evaluate(run.federation.adapter, m._local.test_data)
        for m in small.machines[1:]
    ]
    assert run.records[0].loss == pytest.approx(sum(p.loss_sum for p in parts) / 12, rel=1e-5)
    assert len(run.records[0].clients) == 3


def test_evaluations_of_another_round_are_not_in_the_score(small_federation, tmp_path):
    held: list[Message] = []

    def late(sent: list[Message], answers: Iterator[Message]) -> Iterator[Message]:
        for answer in answers:
            kind = sent[0].metadata.message_type
            if kind == "evaluate" and answer.metadata.src_node_id == 2:
                yield from held
                held[:] = [answer]
            else:
                yield answer

    small = small_federation("rounds.count=2", "rounds.evaluate-every=1")
    run = _run(small, tmp_path, late)
    parts = [
        small.trainer.evaluate(run.federation.adapter, m._local.test_data)
        for m in small.machines[1:]
    ]
    assert run.records[1].loss == pytest.approx(sum(p.loss_sum for p in parts) / 12, rel=1e-5)


def _changed(kind: str, change: Callable[[bytes], bytes], node: int = 2) -> Network:
    """A client whose answers of one kind are changed."""

    def network(sent: list[Message], answers: Iterator[Message]) -> Iterator[Message]:
        requests = {message.metadata.dst_node_id: message for message in sent}
        for answer in answers:
            source = answer.metadata.src_node_id
            if sent[0].metadata.message_type == kind and source == node:
                forged = reply(requests[source], change(unwrap(answer)))
                forged.metadata.__dict__["_src_node_id"] = source
                yield forged
            else:
                yield answer

    return network


@pytest.mark.parametrize("change", [lambda p: p[:-9], lambda p: p + b"\0", lambda p: b""])
def test_a_client_whose_update_is_broken_is_left_out(small_federation, tmp_path, change):
    def cut_vector(payload: bytes) -> bytes:
        return change(payload[:-20])

    small = small_federation()
    run = _run(small, tmp_path, _changed("train", cut_vector))
    assert run.seen.failures == [("client-0", "invalid")] * 3
    expected = _by_hand(small, run.start, lambda _: [1, 2])
    assert np.abs(run.federation.adapter - expected[-1]).max() < 1e-6
    assert all(list(record.failed) == ["client-0"] for record in run.records)


def test_a_client_whose_evaluation_is_broken_is_left_out_of_the_score(small_federation, tmp_path):
    small = small_federation("rounds.count=1")
    run = _run(small, tmp_path, _changed("evaluate", lambda _: b"\xff"))
    parts = [
        small.trainer.evaluate(run.federation.adapter, m._local.test_data)
        for m in small.machines[1:]
    ]
    assert run.records[0].loss == pytest.approx(sum(p.loss_sum for p in parts) / 12, rel=1e-5)


def test_a_client_cannot_grow_its_say_in_the_score(small_federation, tmp_path):
    def boast(payload: bytes) -> bytes:
        honest = codec.decode_evaluate_reply(payload)
        lie = codec.EvaluateReply(honest.context, 10**9, 10**9, 0.0)
        return codec.encode_evaluate_reply(lie)

    small = small_federation("rounds.count=1")
    run = _run(small, tmp_path, _changed("evaluate", boast))
    assert run.records[0].accuracy is not None
    assert run.records[0].accuracy <= 1 - 1e-6


def test_errors_are_recorded_by_client_and_reason(small_federation, tmp_path):
    def broken(sent: list[Message], answers: Iterator[Message]) -> Iterator[Message]:
        for answer in answers:
            if _is_train(sent[0]) and answer.metadata.src_node_id == 4:
                request = next(m for m in sent if m.metadata.dst_node_id == 4)
                error = Message(Error(CLIENT_FAILED, "out of memory"), reply_to=request)
                error.metadata.__dict__["_src_node_id"] = 4
                yield error
            else:
                yield answer

    run = _run(small_federation(), tmp_path, broken)
    assert [record.failed for record in run.records] == [{"client-2": "out of memory"}] * 3
    assert run.seen.failures == [("client-2", "failed")] * 3
    assert all(record.clients == ("client-0", "client-1") for record in run.records)


def test_a_run_ends_when_too_few_are_left_and_keeps_its_rounds(small_federation, tmp_path):
    rounds = iter(range(10))

    def silent_later(sent: list[Message], answers: Iterator[Message]) -> Iterator[Message]:
        late = _is_train(sent[0]) and next(rounds) >= 1 if sent else False
        for answer in answers:
            if not late or answer.metadata.src_node_id == 2:
                yield answer

    with pytest.raises(TooFewClients, match="client-1"):
        _run(small_federation(), tmp_path, silent_later)
    journal = Journal.open(tmp_path / "j.sqlite")
    assert journal.last_state()[0] == 1
    journal.close()


def test_who_does_not_agree_is_refused_and_the_others_go_on(small_federation, tmp_path):
    small = small_federation()
    small.machines[1] = small_federation("train.lr=0.5").machines[1]
    run = _run(small, tmp_path)
    assert [node for node, _ in run.seen.refused] == [3]
    assert "config" in run.seen.refused[0][1]
    expected = _by_hand(small, run.start, lambda _: [0, 2])
    assert np.abs(run.federation.adapter - expected[-1]).max() < 1e-6


def test_a_resumed_run_does_the_rounds_that_are_left(small_federation, tmp_path):
    small = small_federation()
    whole = tmp_path / "whole"
    whole.mkdir()
    expected = _run(small, whole).federation.adapter

    class Interrupted(Exception):
        pass

    def stop(record: RoundRecord) -> None:
        if record.round == 2:
            raise Interrupted

    seen = _Seen()
    start = np.linspace(-0.5, 0.5, small.attached.manifest.size, dtype=np.float32)
    app = make_client_app(lambda c: small.machines[int(c.node_config["partition-id"])])
    for attempt in range(2):
        path = tmp_path / "j.sqlite"
        journal = (
            Journal.open(path)
            if attempt
            else Journal.create(path, {"run_id": "run"}, GlobalState(start, {}))
        )
        federation = Federation(small.config, small.attached.manifest, "ab" * 32, journal)
        grid = LocalGrid(InlinePool({KIND: message_handler(app, 3)}), 3)
        observer = _Seen()
        if not attempt:
            observer.round_committed = stop  # type: ignore[method-assign]
            with pytest.raises(Interrupted):
                FederatedFineTuning(federation, observer).run(grid, 3)
        else:
            FederatedFineTuning(federation, seen).run(grid, 3)
        journal.close()
    assert [record.round for record in seen.committed] == [3]
    assert federation.adapter.tobytes() == expected.tobytes()
