"""Which requests make a batch, when, and what is kept for a second step: at times made up here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedtune.config import Limits, load_server
from fedtune.errors import ConfigError
from fedtune.split.compute import Result, Work
from fedtune.split.kept import KeptGraphs
from fedtune.split.waiting import NotAnswered, Queue, Waiting
from fedtune.wire.split import Kind, Reason

WINDOW, BUSY = 0.5, 10.0
LIMITS = Limits(
    batch_examples=8, batch_tokens=80, kept_examples=16, examples=8, window=WINDOW, busy=BUSY
)
NONE = np.zeros(0, np.int64)


def _waiting(
    client: int,
    arrived: float,
    examples: int = 2,
    longest: int = 5,
    kind: Kind = Kind.OUTPUTS,
    deadline: float = 1e9,
) -> Waiting:
    lengths = np.full(examples, longest)
    tokens = np.zeros((int(lengths.sum()), 4), np.float32)
    return Waiting(client, 1, Work(kind, tokens, lengths, NONE), arrived, deadline)


def _queue(*waiting: Waiting, limits: Limits = LIMITS) -> Queue:
    queue = Queue(limits)
    for one in waiting:
        queue.add(one)
    return queue


def test_a_lone_client_does_not_wait() -> None:
    one = _waiting(1, 5.0)
    assert _queue(one).choose(5.0, True) == ([one], 5.0)


def test_who_has_asked_of_late_is_waited_for() -> None:
    queue = _queue(_waiting(1, 100.0))
    queue.asked(2, 99.0)
    assert queue.choose(100.0, True)[1] == 100.0 + WINDOW


@pytest.mark.parametrize("how", ["left", "silent", "in the batch"])
def test_who_will_not_ask_is_not_waited_for(how: str) -> None:
    queue = _queue(_waiting(1, 100.0))
    queue.asked(2, 99.0 if how != "silent" else 100.0 - BUSY)
    if how == "left":
        queue.left(2)
    if how == "in the batch":
        queue.add(_waiting(2, 100.2))
    assert queue.choose(100.3, True)[1] == 100.0


def test_a_full_batch_does_not_wait_and_the_rest_stays_in_order() -> None:
    waiting = [_waiting(client, 100.0 + client, 3) for client in range(5)]
    queue = _queue(*waiting)
    queue.asked(9, 105.0)
    chosen, ready = queue.choose(105.0, True)
    assert (chosen, ready) == (waiting[:2], 100.0)
    assert queue.take(chosen) == waiting[:2]
    assert queue.choose(105.0, True)[0] == waiting[2:4]


def test_one_long_example_does_not_fill_up_everybodys() -> None:
    short, long = _waiting(1, 1.0, 6, 5), _waiting(2, 1.0, 1, 20)
    assert _queue(short, long).choose(2.0, True)[0] == [short]


def test_a_request_larger_than_a_batch_is_one() -> None:
    large = _waiting(1, 1.0, 20, 50)
    assert _queue(large, _waiting(2, 1.0)).choose(2.0, True)[0] == [large]


def test_what_is_too_late_or_not_wanted_is_dropped() -> None:
    late, gone, fine = _waiting(1, 1.0, deadline=2.0), _waiting(2, 1.0), _waiting(3, 1.0)
    queue = _queue(late, gone, fine)
    queue.left(2)
    assert queue.next_deadline() == 2.0
    assert queue.sweep(2.0) == 2
    assert queue.choose(2.0, True)[0] == [fine]
    with pytest.raises(NotAnswered) as found:
        late.result.result(0)
    assert found.value.reason == Reason.LATE
    assert queue.size == fine.work.tokens.nbytes


def test_without_room_for_graphs_only_they_stay() -> None:
    opening, scoring = _waiting(1, 1.0, kind=Kind.OPEN), _waiting(2, 1.0)
    queue = _queue(opening, scoring)
    assert queue.choose(1.0, False)[0] == [scoring]
    assert queue.choose(1.0, True)[0] == [opening, scoring]


class _Graph:
    """A batch of 8 examples of which each work has 2, and 3 answers."""

    rows = 8

    def shape(self, place: int) -> tuple[int, int]:
        return (2, 3)


def _kept(*clients: int, now: float = 0.0) -> KeptGraphs:
    kept = KeptGraphs(LIMITS)
    kept.keep(_Graph(), {(client, 1): place for place, client in enumerate(clients)}, now)
    return kept


UPSTREAM = np.arange(6, dtype=np.float32)


def test_second_steps_of_a_batch_wait_for_each_other() -> None:
    kept = _kept(1, 2)
    assert kept.choose(0.0) == (None, 0.0)
    kept.step((1, 1), UPSTREAM, 1.0)
    assert kept.choose(1.0)[1] == 1.0 + WINDOW
    kept.step((2, 1), UPSTREAM, 1.2)
    graph, ready = kept.choose(1.2)
    assert ready == 1.0
    taken = kept.take(graph)
    assert set(taken.steps) == {0, 1}
    assert taken.last
    assert kept.choose(9.0) == (None, 9.0)
    np.testing.assert_array_equal(taken.steps[1].upstream, UPSTREAM.reshape(2, 3))


def test_a_graph_stays_for_who_is_still_awaited() -> None:
    kept = _kept(1, 2)
    kept.step((2, 1), UPSTREAM, 1.0)
    taken = kept.take(kept.choose(2.0)[0])
    assert not taken.last
    assert (kept.of(1), kept.of(2)) == (1, 0)
    with pytest.raises(NotAnswered):
        kept.step((2, 1), UPSTREAM, 2.0)


def test_a_second_step_that_does_not_come_is_given_up() -> None:
    kept = _kept(1, 2)
    assert kept.next_deadline() == LIMITS.upstream
    kept.step((1, 1), UPSTREAM, LIMITS.upstream - 0.1)
    kept.sweep(LIMITS.upstream)
    assert (kept.of(1), kept.of(2)) == (1, 0)
    assert kept.choose(LIMITS.upstream)[1] < LIMITS.upstream
    with pytest.raises(NotAnswered) as found:
        kept.step((2, 1), UPSTREAM, LIMITS.upstream)
    assert found.value.reason == Reason.FORGOTTEN


def test_a_graph_goes_with_its_last_client() -> None:
    kept = _kept(1, 2)
    step = kept.step((1, 1), UPSTREAM, 1.0)
    kept.left(1)
    assert step.cancelled()
    kept.left(2)
    kept.sweep(2.0)
    assert kept.next_deadline() is None


def test_there_is_room_for_two_graphs() -> None:
    kept = _kept(1)
    assert kept.has_room
    kept.keep(_Graph(), {(2, 1): 0}, 0.0)
    assert not kept.has_room
    kept.left(1)
    kept.sweep(0.0)
    assert kept.has_room


def test_an_upstream_must_be_of_the_size_of_its_logits() -> None:
    with pytest.raises(ValueError, match="reshape"):
        _kept(1).step((1, 1), UPSTREAM[:5], 0.0)


def test_a_result_is_finite_or_not() -> None:
    assert Result(UPSTREAM, None).finite
    assert not Result(UPSTREAM, np.array([np.inf], np.float32)).finite


@pytest.mark.parametrize("wrong", ["examples = 0", "window = -1.0", "kept-examples = 63"])
def test_limits_that_cannot_be(wrong: str, tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text(f"[limits]\n{wrong}\n")
    with pytest.raises(ConfigError, match=wrong.split(maxsplit=1)[0]):
        load_server(tmp_path / "server.toml")
