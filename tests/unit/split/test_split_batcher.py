"""The thread that computes, with a real decoder that can be held up."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

import numpy as np
import pytest
from split_service import LONG, Held, some_examples, wait_for

from fedtune.base.answering import AnsweringDecoder
from fedtune.config import Limits
from fedtune.split.batcher import Batcher
from fedtune.split.compute import Result, Work
from fedtune.split.counters import Counters
from fedtune.split.waiting import NotAnswered
from fedtune.train.cut import InProcessBase
from fedtune.wire.split import Kind, Reason

NONE = np.zeros(0, np.int64)


@pytest.fixture
def held(decoder: AnsweringDecoder) -> Held:
    return Held(decoder)


@pytest.fixture
def start(held: Held) -> Iterator[Callable[..., Batcher]]:
    made: list[Batcher] = []

    def make(counters: Counters | None = None, **limits: Any) -> Batcher:
        made.append(Batcher(held, Limits(**limits), counters or Counters()))
        return made[-1]

    yield make
    held.gate.set()
    for batcher in made:
        batcher.close()


def work(decoder: Any, kind: Kind = Kind.OUTPUTS, seed: int = 0, count: int = 3) -> Work:
    embeddings, lengths, labels = some_examples(seed, count, decoder.width)
    counted = np.arange(embeddings.shape[1]) < lengths[:, None]
    return Work(kind, embeddings[counted], lengths, labels if kind == Kind.DIFFERENTIATE else NONE)


def reason(result: Future[Result]) -> Reason:
    with pytest.raises(NotAnswered) as found:
        result.result(LONG)
    return found.value.reason


def test_requests_that_wait_at_one_moment_share_a_batch(start: Any, held: Held) -> None:
    counters = Counters()
    batcher = start(counters)
    held.gate.clear()
    results = [batcher.submit(0, 1, work(held), LONG)]
    assert held.entered.acquire(timeout=LONG)
    kinds = [Kind.DIFFERENTIATE, Kind.OUTPUTS, Kind.OPEN, Kind.DIFFERENTIATE]
    works = [work(held, kind, seed, 2 + seed) for seed, kind in enumerate(kinds)]
    results = [batcher.submit(1 + place, 1, one, LONG) for place, one in enumerate(works)]
    held.gate.set()
    found = [result.result(LONG) for result in results]
    assert held.rows == [3, 2 + 3 + 4 + 5]
    alone = InProcessBase(held.decoder)
    embeddings, lengths, labels = some_examples(3, 5, held.width)
    losses, gradient = alone.differentiate(embeddings, lengths, labels)
    counted = np.arange(embeddings.shape[1]) < lengths[:, None]
    np.testing.assert_allclose(found[3].values, losses, atol=1e-5)
    np.testing.assert_allclose(found[3].gradient, gradient[counted], atol=1e-5)
    status = counters.status
    assert (status.batches, status.requests, status.examples) == (2, 5, 17)
    assert (status.largest_batch, status.examples_per_batch) == (14, 8.5)
    assert 0 < status.longest_wait <= status.queue_seconds


def test_a_lone_client_is_answered_without_delay(start: Any, held: Held) -> None:
    batcher = start(window=10 * LONG)
    for number in range(1, 4):
        batcher.submit(1, number, work(held), LONG).result(LONG)


def test_a_client_at_work_is_waited_for(start: Any, held: Held) -> None:
    batcher = start(window=10 * LONG, busy=10 * LONG)
    for client in (1, 2):
        result = batcher.submit(client, 1, work(held), LONG)
        if client == 1:
            result.result(LONG)
    first = batcher.submit(1, 2, work(held), LONG)
    wait([result, first], LONG)
    # Client 2's was held back until client 1 asked again; nothing was computed alone since.
    assert held.rows == [3, 6]


def test_a_client_that_left_is_not_waited_for(start: Any, held: Held) -> None:
    batcher = start(window=10 * LONG, busy=10 * LONG)
    batcher.submit(1, 1, work(held), LONG).result(LONG)
    second = batcher.submit(2, 1, work(held), LONG)
    batcher.left(1)
    second.result(LONG)


@pytest.mark.parametrize("how", ["late", "cancelled", "left"])
def test_what_nobody_waits_for_is_not_computed(start: Any, held: Held, how: str) -> None:
    batcher = start()
    held.gate.clear()
    first = batcher.submit(1, 1, work(held), LONG)
    assert held.entered.acquire(timeout=LONG)
    submitted = time.monotonic()
    dropped = batcher.submit(2, 1, work(held, count=7), 0.01 if how == "late" else LONG)
    wanted = batcher.submit(3, 1, work(held, count=2), LONG)
    if how == "late":
        while time.monotonic() <= submitted + 0.02:
            time.sleep(0.005)
    elif how == "cancelled":
        dropped.cancel()
    else:
        batcher.left(2)
    held.gate.set()
    for result in (first, wanted):
        result.result(LONG)
    assert held.rows == [3, 2]
    if how == "late":
        assert reason(dropped) == Reason.LATE
    else:
        assert dropped.cancelled()


def test_a_second_step_gives_the_gradient_and_its_graph_back(start: Any, held: Held) -> None:
    batcher = start()
    embeddings, lengths, _ = some_examples(0, 3, held.width)
    scores = batcher.submit(1, 1, work(held, Kind.OPEN), LONG).result(LONG).values
    assert batcher.kept(1) == 1
    gc.collect()
    assert held.inputs[0]() is not None
    upstream = np.random.default_rng(0).normal(size=scores.shape).astype(np.float32)
    found = batcher.pull_back(1, 1, upstream.reshape(-1)).result(LONG)
    expected = InProcessBase(held.decoder).pull_back(embeddings, lengths, lambda _: upstream)
    counted = np.arange(embeddings.shape[1]) < lengths[:, None]
    np.testing.assert_allclose(found.gradient, expected[counted], atol=1e-5)
    assert batcher.kept(1) == 0
    with pytest.raises(NotAnswered):
        batcher.pull_back(1, 1, upstream.reshape(-1))

    def gone() -> bool:
        gc.collect()
        return held.inputs[0]() is None

    wait_for(gone)


def test_second_steps_are_not_mixed_up_between_clients(start: Any, held: Held) -> None:
    batcher = start()
    batcher.submit(1, 1, work(held, Kind.OPEN), LONG).result(LONG)
    with pytest.raises(NotAnswered) as found:
        batcher.pull_back(2, 1, np.zeros(15, np.float32))
    assert found.value.reason == Reason.FORGOTTEN


def test_at_the_bound_of_graphs_requests_wait_and_others_pass(start: Any, held: Held) -> None:
    batcher = start(examples=3, batch_examples=3, kept_examples=3)
    scores = batcher.submit(1, 1, work(held, Kind.OPEN), LONG).result(LONG).values
    second = batcher.submit(2, 1, work(held, Kind.OPEN, 1), LONG)
    batcher.submit(3, 1, work(held), LONG).result(LONG)
    assert not second.done()
    batcher.pull_back(1, 1, scores.reshape(-1)).result(LONG)
    second.result(LONG)


def test_a_graph_is_not_kept_for_longer_than_the_limit(start: Any, held: Held) -> None:
    batcher = start(upstream=0.05, examples=3, batch_examples=3, kept_examples=3)
    batcher.submit(1, 1, work(held, Kind.OPEN), LONG).result(LONG)
    # Nothing but time makes room for it.
    batcher.submit(2, 1, work(held, Kind.OPEN), LONG).result(LONG)
    with pytest.raises(NotAnswered):
        batcher.pull_back(1, 1, np.zeros(15, np.float32))


def test_nothing_is_kept_for_who_left_meanwhile(start: Any, held: Held) -> None:
    batcher = start()
    held.gate.clear()
    result = batcher.submit(1, 1, work(held, Kind.OPEN), LONG)
    assert held.entered.acquire(timeout=LONG)
    batcher.left(1)
    held.gate.set()
    result.result(LONG)
    assert batcher.kept(1) == 0


def test_a_batch_that_fails_is_not_the_end(
    start: Any, held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    batcher = start()
    held.error = MemoryError()
    assert reason(batcher.submit(1, 1, work(held), LONG)) == Reason.FAILED
    held.error = None
    assert batcher.submit(1, 2, work(held), LONG).result(LONG).finite
    assert "a batch was not computed" in caplog.text


def test_what_is_not_finite_is_refused_and_not_kept(start: Any, held: Held) -> None:
    batcher = start()
    for number, kind in enumerate((Kind.DIFFERENTIATE, Kind.OPEN), 1):
        spoiled = work(held, kind)
        spoiled.tokens[:] = np.nan
        assert reason(batcher.submit(1, number, spoiled, LONG)) == Reason.NOT_FINITE
    assert batcher.kept(1) == 0


def test_closed_it_refuses_what_waits_and_what_comes(start: Any, held: Held) -> None:
    batcher = start(window=10 * LONG, busy=10 * LONG)
    batcher.submit(1, 1, work(held), LONG).result(LONG)
    waiting = batcher.submit(2, 1, work(held), LONG)  # for client 1
    batcher.close()
    assert reason(waiting) == Reason.STOPPING
    with pytest.raises(NotAnswered):
        batcher.submit(1, 2, work(held), LONG)


def test_the_queue_is_bounded_in_bytes(start: Any, held: Held) -> None:
    batcher = start(queue_bytes=5000)
    held.gate.clear()
    batcher.submit(1, 1, work(held), LONG)
    assert held.entered.acquire(timeout=LONG)
    assert batcher.has_room(10**9)  # one alone always may
    waiting = batcher.submit(2, 1, work(held, count=1), LONG)
    assert batcher.has_room(100)
    assert not batcher.has_room(5000)
    held.gate.set()
    waiting.result(LONG)
