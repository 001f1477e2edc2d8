"""A base model whose server is killed, stopped, slow, full, silent, or somebody else."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from split_raw import a_request, member
from split_service import (
    HOST,
    LONG,
    Held,
    Parties,
    ServerProcess,
    serving,
    some_examples,
    wait_for,
)

from fedtune.base.answering import AnsweringDecoder
from fedtune.config import Limits
from fedtune.errors import BaseRefused, BaseUnreachable, ConfigError, TrainingError
from fedtune.split.client import Patience
from fedtune.split.server import SplitServer
from fedtune.train.cut import InProcessBase
from fedtune.wire.split import Answer, Kind, Reason, Refusal, Terms, Upstream

BRIEF = Patience(total=1.0, connect=1.0)


@pytest.fixture(scope="module")
def parties() -> Parties:
    return Parties.make("a", "b", "c")


@pytest.fixture
def held(decoder: AnsweringDecoder) -> Iterator[Held]:
    found = Held(decoder)
    yield found
    found.gate.set()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as found:
        yield found


def _ask(pool: ThreadPoolExecutor, base: Any, seed: int, width: int) -> Future[Any]:
    return pool.submit(base.differentiate, *some_examples(seed, 3, width))


def _alone(decoder: AnsweringDecoder, seed: int) -> Any:
    return InProcessBase(decoder).differentiate(*some_examples(seed, 3, decoder.width))


def _same(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_server_that_is_killed_in_a_batch_is_asked_again_when_it_is_back(
    decoder: AnsweringDecoder,
    tiny_decoder: Path,
    parties: Parties,
    terms: Terms,
    tmp_path: Path,
    pool: ThreadPoolExecutor,
) -> None:
    process = ServerProcess(tmp_path, tiny_decoder, parties.roster, held=True).start()
    alone = InProcessBase(decoder)
    restarts = []

    def upstream(logits: np.ndarray) -> np.ndarray:
        if not restarts:  # between the two steps of a request
            process.kill()
            restarts.append(process.start())
        return np.tanh(logits)

    with parties.base("a", process.port, terms) as base:
        embeddings, lengths, labels = some_examples(1, 3, decoder.width)
        expected = alone.differentiate(embeddings, lengths, labels)
        _same(base.differentiate(embeddings, lengths, labels), expected)
        process.begun.unlink()
        process.hold.touch()
        asked = _ask(pool, base, 1, decoder.width)
        wait_for(process.begun.exists)
        process.kill()
        process.hold.unlink()
        process.start()
        _same(asked.result(LONG), expected)
        gradient = base.pull_back(embeddings, lengths, upstream)
        assert restarts
        _same([gradient], [alone.pull_back(embeddings, lengths, np.tanh)])
    # The last of three has seen one request.
    assert process.stop()["batches"] == 1


def test_a_server_that_does_not_answer_in_time_is_given_up(
    held: Held, parties: Parties, terms: Terms
) -> None:
    held.gate.clear()
    with (
        serving(held, parties.roster) as server,
        parties.base("b", server.port, terms, patience=BRIEF) as late,
        parties.base("a", server.port, terms) as base,
        ThreadPoolExecutor(1) as pool,
    ):
        asked = _ask(pool, base, 1, held.width)
        assert held.entered.acquire(timeout=LONG)
        started = time.monotonic()
        with pytest.raises(BaseUnreachable, match=rf"{HOST}:{server.port}.*within 1 s"):
            late.outputs(*some_examples(2, 7, held.width)[:2])
        assert time.monotonic() - started < 10
        held.gate.set()
        asked.result(LONG)
    # Nobody waited for the other any more.
    assert held.rows == [3]


def test_a_request_past_its_deadline_is_refused_and_not_computed(
    held: Held, parties: Parties, terms: Terms
) -> None:
    with serving(held, parties.roster) as server, member(server.port, parties, "a", terms) as raw:
        held.gate.clear()
        raw.say(a_request(terms, 1))
        assert held.entered.acquire(timeout=LONG)
        request = a_request(terms, 2, count=7)
        raw.say(replace(request, patience=1))
        raw.say(a_request(terms, 3))  # is refused, so the one before was taken
        assert raw.hear() == Refusal(3, Reason.BUSY)
        time.sleep(0.002)  # longer than the client waits
        held.gate.set()
        heard = {said.number: said for said in (raw.hear(), raw.hear())}
    assert heard[2] == Refusal(2, Reason.LATE)
    assert isinstance(heard[1], Answer)
    assert held.rows == [3]
    assert server.status.not_answered == {Reason.BUSY: 1, Reason.LATE: 1}


def test_a_full_queue_is_waited_for(
    held: Held, parties: Parties, terms: Terms, pool: ThreadPoolExecutor
) -> None:
    held.gate.clear()
    limits = Limits(queue_bytes=5000)  # one request
    with (
        serving(held, parties.roster, limits=limits) as server,
        parties.base("a", server.port, terms) as a,
        parties.base("b", server.port, terms) as b,
        parties.base("c", server.port, terms) as c,
        parties.base("a", server.port, terms, patience=BRIEF) as brief,
    ):
        computed = _ask(pool, a, 1, held.width)
        assert held.entered.acquire(timeout=LONG)
        waiting = _ask(pool, b, 2, held.width)
        refused = _ask(pool, c, 3, held.width)
        # One of the two has the queue, the other is told to come again, and does.
        wait_for(lambda: server.status.not_answered.get(Reason.BUSY, 0) >= 3)
        assert not waiting.done()
        assert not refused.done()
        held.gate.set()
        for seed, asked in enumerate((computed, waiting, refused), 1):
            _same(asked.result(LONG), _alone(held.decoder, seed))
        assert brief is not None


def test_a_client_that_is_always_told_to_come_again_gives_up(
    held: Held, parties: Parties, terms: Terms, pool: ThreadPoolExecutor
) -> None:
    held.gate.clear()
    with (
        serving(held, parties.roster, limits=Limits(queue_bytes=5000)) as server,
        member(server.port, parties, "a", terms) as raw,
        parties.base("c", server.port, terms, patience=BRIEF) as c,
    ):
        raw.say(a_request(terms, 1))
        assert held.entered.acquire(timeout=LONG)
        raw.say(a_request(terms, 2))
        raw.say(a_request(terms, 3))
        assert raw.hear() == Refusal(3, Reason.BUSY)
        with pytest.raises(BaseUnreachable, match="too much to do; let fewer clients"):
            c.outputs(*some_examples(3, 3, held.width)[:2])
        held.gate.set()


def test_who_breaks_off_frees_what_was_asked_and_kept(
    held: Held, parties: Parties, terms: Terms
) -> None:
    limits = Limits(examples=3, batch_examples=3, kept_examples=3, upstream=10 * LONG)
    with serving(held, parties.roster, limits=limits) as server:
        with member(server.port, parties, "a", terms) as raw:
            raw.say(a_request(terms, 1, Kind.OPEN))
            assert isinstance(raw.hear(), Answer)
        # There is room for one graph, and the one of who left would be kept for ten minutes.
        with parties.base("b", server.port, terms) as base:
            embeddings, lengths, _ = some_examples(1, 3, held.width)
            base.pull_back(embeddings, lengths, np.tanh)


def test_a_second_step_that_fails_at_the_client_leaves_nothing_behind(
    held: Held, parties: Parties, terms: Terms
) -> None:
    limits = Limits(examples=3, batch_examples=3, kept_examples=3, upstream=10 * LONG)
    embeddings, lengths, _ = some_examples(1, 3, held.width)
    with (
        serving(held, parties.roster, limits=limits) as server,
        parties.base("a", server.port, terms) as base,
    ):
        with pytest.raises(ZeroDivisionError):
            base.pull_back(embeddings, lengths, lambda _: np.float32(1 / 0))
        base.pull_back(embeddings, lengths, np.tanh)


def test_a_second_step_that_comes_too_late_begins_anew(
    held: Held, parties: Parties, terms: Terms
) -> None:
    limits = Limits(upstream=0.05)
    embeddings, lengths, _ = some_examples(1, 3, held.width)
    calls = []
    with (
        serving(held, parties.roster, limits=limits) as server,
        parties.base("a", server.port, terms) as base,
    ):

        def upstream(logits: np.ndarray) -> np.ndarray:
            calls.append(len(logits))
            if len(calls) == 1:
                time.sleep(0.2)
            return np.tanh(logits)

        found = base.pull_back(embeddings, lengths, upstream)
    _same([found], [InProcessBase(held.decoder).pull_back(embeddings, lengths, np.tanh)])
    assert len(calls) >= 2
    assert server.status.not_answered[Reason.FORGOTTEN] >= 1


def test_a_server_that_stops_answers_what_it_has_and_refuses_the_rest(
    held: Held, parties: Parties, terms: Terms, pool: ThreadPoolExecutor
) -> None:
    server = SplitServer(held, terms, parties.roster, HOST, 0, None).start()
    held.gate.clear()
    with (
        parties.base("a", server.port, terms) as a,
        parties.base("b", server.port, terms, patience=BRIEF) as b,
    ):
        asked = _ask(pool, a, 1, held.width)
        assert held.entered.acquire(timeout=LONG)
        stopped = pool.submit(server.stop, LONG)
        with pytest.raises(BaseUnreachable, match="being stopped"):
            b.outputs(*some_examples(2, 2, held.width)[:2])
        assert not stopped.done()
        held.gate.set()
        _same(asked.result(LONG), _alone(held.decoder, 1))
        stopped.result(LONG)
    assert held.rows == [3]


def test_a_server_that_stops_waits_for_second_steps(
    held: Held, parties: Parties, terms: Terms, pool: ThreadPoolExecutor
) -> None:
    server = SplitServer(held, terms, parties.roster, HOST, 0, None).start()
    embeddings, lengths, _ = some_examples(1, 3, held.width)
    stopped: list[Future[None]] = []

    def upstream(logits: np.ndarray) -> np.ndarray:
        stopped.append(pool.submit(server.stop, LONG))
        with (
            parties.base("b", server.port, terms, patience=BRIEF) as other,
            pytest.raises(BaseUnreachable, match="being stopped"),
        ):
            other.outputs(embeddings, lengths)
        return np.tanh(logits)

    with parties.base("a", server.port, terms) as base:
        found = base.pull_back(embeddings, lengths, upstream)
    _same([found], [InProcessBase(held.decoder).pull_back(embeddings, lengths, np.tanh)])
    stopped[0].result(LONG)
    assert len(stopped) == 1


def test_who_waits_for_an_answer_can_be_stopped(
    held: Held, parties: Parties, terms: Terms, pool: ThreadPoolExecutor
) -> None:
    held.gate.clear()
    with serving(held, parties.roster) as server:
        base = parties.base("a", server.port, terms)
        asked = _ask(pool, base, 1, held.width)
        assert held.entered.acquire(timeout=LONG)
        base.close()
        with pytest.raises(BaseUnreachable, match="closed"):
            asked.result(LONG)
        held.gate.set()


def test_training_that_diverged_is_said_so(
    decoder: AnsweringDecoder, parties: Parties, terms: Terms
) -> None:
    embeddings, lengths, labels = some_examples(1, 3, decoder.width)
    with (
        serving(decoder, parties.roster) as server,
        parties.base("a", server.port, terms) as base,
    ):
        with pytest.raises(TrainingError, match=r"lower train\.lr"):
            base.outputs(embeddings * np.inf, lengths)
        assert server.status.requests == 0
        signs = np.where(embeddings > 0, np.float32(3e38), np.float32(-3e38))
        with pytest.raises(TrainingError, match=r"lower train\.lr"):
            base.differentiate(signs, lengths, labels)
        base.outputs(embeddings, lengths)


def test_a_server_that_failed_at_a_request_is_not_asked_again(
    held: Held, parties: Parties, terms: Terms
) -> None:
    held.error = MemoryError()
    with (
        serving(held, parties.roster) as server,
        parties.base("a", server.port, terms) as base,
        pytest.raises(BaseRefused, match="see its log"),
    ):
        base.outputs(*some_examples(1, 3, held.width)[:2])
    assert held.rows == [3]


@pytest.mark.parametrize("how", ["nobody", "silent", "silent with TLS"])
def test_nobody_waits_for_ever(how: str, parties: Parties, terms: Terms, split_keys: Path) -> None:
    authority = (split_keys / "ca.crt").read_bytes() if "TLS" in how else None
    with closing(socket.create_server((HOST, 0))) as door:
        port = door.getsockname()[1]
        if how == "nobody":
            door.close()
        with parties.base("a", port, terms, authority, patience=BRIEF) as base:
            started = time.monotonic()
            with pytest.raises(BaseUnreachable, match="is it running"):
                base.outputs(*some_examples(1, 3, terms.width)[:2])
            assert time.monotonic() - started < 10


def test_somebody_else_at_the_address_is_noticed(parties: Parties, terms: Terms) -> None:
    other = grpc.server(ThreadPoolExecutor(1))
    port = other.add_insecure_port(f"{HOST}:0")
    other.start()
    with (
        parties.base("a", port, terms) as base,
        pytest.raises(BaseRefused, match="no server of a base model"),
    ):
        base.outputs(*some_examples(1, 3, terms.width)[:2])
    other.stop(None)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("federation", "cd" * 32, r"federation\.toml"),
        ("base", "cd" * 32, r"base\.digest"),
        ("answers", "cd" * 32, r"data\.labels"),
        ("width", 65, "width"),
        ("answer_count", 6, r"data\.labels"),
        ("encoding", "float16", r"split\.activations"),
    ],
)
def test_another_federation_is_refused_before_anything_is_sent(
    decoder: AnsweringDecoder,
    parties: Parties,
    terms: Terms,
    field: str,
    value: Any,
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    other = replace(terms, **{field: value})
    with (
        serving(decoder, parties.roster) as server,
        parties.base("a", server.port, other) as base,
        pytest.raises(BaseRefused, match=words),
    ):
        base.outputs(*some_examples(1, 3, other.width)[:2])
    assert "fedtune.split" not in {record.name.rpartition(".")[0] for record in caplog.records}


def test_a_port_that_is_taken(decoder: AnsweringDecoder, parties: Parties, terms: Terms) -> None:
    with serving(decoder, parties.roster) as server:
        second = SplitServer(decoder, terms, parties.roster, HOST, server.port, None)
        with pytest.raises(ConfigError, match=f"{HOST}:{server.port}"):
            second.start()
        second.stop()


def test_threads_take_turns(
    decoder: AnsweringDecoder, parties: Parties, terms: Terms, pool: ThreadPoolExecutor
) -> None:
    with (
        serving(decoder, parties.roster) as server,
        parties.base("a", server.port, terms) as base,
    ):
        together = threading.Barrier(4)

        def ask(seed: int) -> Any:
            together.wait(LONG)
            return base.differentiate(*some_examples(seed, 3, decoder.width))

        for seed, found in enumerate(pool.map(ask, range(4))):
            _same(found, _alone(decoder, seed))
    assert server.status.not_answered == {}


def test_an_upstream_may_come_while_another_request_waits(
    held: Held, parties: Parties, terms: Terms
) -> None:
    with serving(held, parties.roster) as server, member(server.port, parties, "a", terms) as raw:
        raw.say(a_request(terms, 1, Kind.OPEN))
        raw.hear()
        raw.say(a_request(terms, 2))
        raw.say(Upstream(1, 30_000, np.ones(15, np.float32).tobytes()))
        heard = {said.number: said for said in (raw.hear(), raw.hear())}
    assert len(heard[1].gradient) == int(a_request(terms, 1).lengths.sum()) * terms.width * 4
    assert len(heard[2].values) == 4 * 15
