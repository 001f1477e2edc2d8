"""The server's half of a round: who is drawn, what is counted, what is refused."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.aggregate import MomentumRule
from fedtune.errors import ContextMismatch, JobError, TooFewClients, WireError
from fedtune.round.server import GlobalState, Member, PlainRound, draw_cohort, minimum_clients
from fedtune.round.updates import FloatUpdates
from fedtune.types import RoundContext
from fedtune.update import HalfPrecision, UpdatePipeline
from fedtune.wire import codec

CONTEXT = RoundContext("run", 2, "aa" * 32, "bb" * 32, "cc" * 32)
SIZE = 3
COHORT = [Member("a", 10, 0), Member("b", 30, 0), Member("c", 5, 0)]
NAMES = st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=12, unique=True)


def _round(**changes: object) -> PlainRound:
    fields = {"context": CONTEXT, "cohort": COHORT, "updates": FloatUpdates(UpdatePipeline(SIZE))}
    return PlainRound(**{**fields, **changes})  # type: ignore[arg-type]


def _reply(
    update: list[float],
    examples: int,
    loss: float = 1.0,
    context: RoundContext = CONTEXT,
    seconds: float = 2.0,
) -> bytes:
    data = np.array(update, "<f4").tobytes()
    return codec.encode_train_reply(codec.TrainReply(context, data, examples, loss, seconds))


@given(NAMES, st.integers(1, 14), st.integers(0, 2**32 - 1), st.integers(1, 9), st.randoms())
def test_a_cohort_is_a_function_of_names_seed_and_round(names, size, seed, number, random):
    members = [Member(name, 1, 0) for name in names]
    cohort = draw_cohort(members, size, seed, number)
    assert len(cohort) == min(size, len(members))
    assert [m.name for m in cohort] == sorted({m.name for m in cohort})
    assert set(cohort) <= set(members)
    shuffled = random.sample(members, len(members))
    assert draw_cohort(shuffled, size, seed, number) == cohort
    assert len(draw_cohort(shuffled, None, seed, number)) == len(members)


def test_cohorts_are_uniform_over_members_and_pairs():
    members = [Member(f"m{i}", 1, 0) for i in range(10)]
    drawn: Counter[str] = Counter()
    pairs: Counter[tuple[str, ...]] = Counter()
    rounds, size = 4000, 3
    for number in range(rounds):
        names = [m.name for m in draw_cohort(members, size, 7, number)]
        drawn.update(names)
        pairs.update(combinations(names, 2))
    share = size / 10
    # Drawing without replacement: each count has variance Rp(1-p), and they add up to a constant.
    variance = rounds * share * (1 - share)
    squares = sum((drawn[m.name] - rounds * share) ** 2 for m in members)
    statistic = squares / variance * 9 / 10
    assert 1.15 < statistic < 33.7  # χ² with 9 degrees of freedom, 0.1 % and 99.99 %
    # 45 pairs of which 3 are drawn each time; 5.5 standard deviations.
    expected = rounds * 3 / 45
    assert all(abs(pairs[p] - expected) < 5.5 * math.sqrt(expected) for p in pairs)
    assert len(pairs) == 45


def test_cohorts_differ_from_round_to_round_and_from_seed_to_seed():
    members = [Member(f"m{i}", 1, 0) for i in range(40)]
    cohorts = [draw_cohort(members, 5, seed, number) for seed in range(4) for number in range(4)]
    assert len({tuple(cohort) for cohort in cohorts}) == 16


@pytest.mark.parametrize(
    ("configured", "cohort", "minimum"),
    [(None, 1, 1), (None, 2, 1), (None, 3, 2), (None, 8, 4), (None, 9, 5), (3, 8, 3), (1, 8, 1)],
)
def test_minimum_clients(configured, cohort, minimum):
    assert minimum_clients(configured, cohort) == minimum


@pytest.mark.parametrize("by_examples", [True, False])
def test_a_round_is_the_weighted_mean_of_what_was_counted(by_examples):
    opened = _round(by_examples=by_examples)
    updates = {"c": [1.0, 2.0, 3.0], "a": [-1.0, 0.5, 8.0]}
    sizes = {"a": 10, "c": 5}
    losses = {"a": 4.0, "c": 1.0}
    payloads = {n: _reply(updates[n], sizes[n], losses[n]) for n in updates}
    for name in ("c", "a"):
        opened.receive(name, payloads[name])
    assert opened.pending == ["b"]
    opened.fail("b", "power cut")
    start = np.array([10.0, 20.0, 30.0], np.float32)
    state = opened.close(MomentumRule(), GlobalState(start, {}), minimum=2)
    weights = [sizes[n] if by_examples else 1 for n in ("a", "c")]
    mean = np.average([updates["a"], updates["c"]], axis=0, weights=weights)
    assert state.adapter == pytest.approx(start + mean, rel=1e-6)
    assert opened.train_loss == pytest.approx((4.0 * 10 + 1.0 * 5) / 15)
    assert opened.counted == ("a", "c")
    assert opened.failed == {"b": "power cut"}
    assert opened.bytes_up == sum(map(len, payloads.values()))
    assert opened.train_seconds == 4.0


def test_updates_are_decoded_by_the_pipeline():
    opened = _round(
        cohort=COHORT[:1], updates=FloatUpdates(UpdatePipeline(SIZE, [HalfPrecision()]))
    )
    data = np.array([0.5, -2.0, 1.0], "<f2").tobytes()
    reply = codec.TrainReply(CONTEXT, data, 10, 1.0, 0.0)
    opened.receive("a", codec.encode_train_reply(reply))
    state = opened.close(MomentumRule(), GlobalState(np.zeros(SIZE, np.float32), {}), 1)
    assert state.adapter.tolist() == [0.5, -2.0, 1.0]


def test_the_request_holds_the_adapter():
    adapter = np.array([1.5, -2.0, 3.25], np.float32)
    request = codec.decode_train_request(next(iter(_round().begin(adapter).requests.values())), 12)
    assert request.context == CONTEXT
    assert np.frombuffer(request.adapter, "<f4").tolist() == adapter.tolist()


def _with(**changes: object) -> RoundContext:
    return replace(CONTEXT, **changes)


@pytest.mark.parametrize(
    "payload",
    [
        _reply([1, 2, 3], 10, context=_with(round=1)),
        _reply([1, 2, 3], 10, context=_with(round=3)),
        _reply([1, 2, 3], 10, context=_with(run_id="other")),
        _reply([1, 2, 3], 10, context=_with(base_digest="dd" * 32)),
        _reply([1, 2, 3], 10, context=_with(manifest_digest="dd" * 32)),
        _reply([1, 2, 3], 10, context=_with(config_digest="dd" * 32)),
        _reply([1, 2, 3], 11),
        _reply([1, 2, 3], 10**6),
        _reply([1, 2], 10),
        _reply([1, 2, 3, 4], 10),
        _reply([1, float("nan"), 3], 10),
        _reply([1, 2, float("-inf")], 10),
        _reply([1, 2, 3], 10, loss=float("nan")),
        b"",
        b"\xff\xff",
    ],
)
def test_what_is_not_acceptable_leaves_the_client_pending(payload):
    opened = _round()
    with pytest.raises(WireError):
        opened.receive("a", payload)
    assert opened.pending == ["a", "b", "c"]
    assert (opened.counted, opened.bytes_up, opened.train_seconds) == ((), 0, 0.0)
    opened.receive("a", _reply([1, 2, 3], 10))
    assert opened.counted == ("a",)


def test_a_context_of_another_round_is_named_so():
    with pytest.raises(ContextMismatch, match="round"):
        _round().receive("a", _reply([1, 2, 3], 10, context=_with(round=7)))


def test_only_members_of_the_cohort_and_each_once():
    opened = _round()
    with pytest.raises(WireError, match="mallory"):
        opened.receive("mallory", _reply([9, 9, 9], 10))
    with pytest.raises(WireError, match="mallory"):
        opened.fail("mallory", "x")
    opened.receive("a", _reply([1, 1, 1], 10))
    opened.fail("b", "x")
    for name, examples in (("a", 10), ("b", 30)):
        with pytest.raises(WireError, match=f"{name} has answered"):
            opened.receive(name, _reply([5, 5, 5], examples))
        with pytest.raises(WireError, match=f"{name} has answered"):
            opened.fail(name, "again")
    opened.receive("c", _reply([4, 4, 4], 5))
    state = opened.close(MomentumRule(), GlobalState(np.zeros(SIZE, np.float32), {}), 1)
    assert state.adapter == pytest.approx(np.full(SIZE, (10 + 20) / 15), rel=1e-6)


def test_a_round_does_not_close_before_all_answered_or_with_too_few():
    opened = _round()
    state = GlobalState(np.zeros(SIZE, np.float32), {})
    opened.receive("a", _reply([1, 1, 1], 10))
    opened.fail("b", "power cut")
    with pytest.raises(ValueError, match="c"):
        opened.close(MomentumRule(), state, 1)
    opened.fail("c", "lost")
    with pytest.raises(TooFewClients, match="power cut"):
        opened.close(MomentumRule(), state, 2)
    assert opened.close(MomentumRule(), state, 1).adapter.tolist() == [1, 1, 1]


def test_without_anyone_counted_there_is_no_training_loss():
    opened = _round()
    for member in COHORT:
        opened.fail(member.name, "x")
    assert opened.train_loss is None


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_round_whose_adapter_is_not_finite_fails():
    opened = _round(cohort=COHORT[:1])
    opened.receive("a", _reply([3e38, 0, 0], 10))
    start = np.array([3e38, 0, 0], np.float32)
    with pytest.raises(JobError, match="finite"):
        opened.close(MomentumRule(), GlobalState(start, {}), 1)
