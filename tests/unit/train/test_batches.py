"""Batches: every row in turn, repeatable, with little padding. Rates: endpoints and monotone."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.train.batches import client_rng, learning_rate, plan_batches


def _plan(lengths: list[int], steps: int, batch_size: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return list(plan_batches(np.array(lengths, np.int64), steps, batch_size, rng))


def _worst_lead(batches: list[np.ndarray], rows: int) -> int:
    """How many times more the most frequent row was seen than the least, at worst, while
    counting along whole batches."""
    seen = Counter(dict.fromkeys(range(rows), 0))
    worst = 0
    for batch in batches:
        seen.update(batch.tolist())
        worst = max(worst, max(seen.values()) - min(seen.values()))
    return worst


@given(st.integers(1, 400), st.integers(1, 40), st.integers(1, 33), st.integers(0, 99))
def test_shapes(rows, steps, batch_size, seed):
    batches = _plan([1 + i % 7 for i in range(rows)], steps, batch_size, seed)
    assert [batch.shape for batch in batches] == [(min(batch_size, rows),)] * steps
    assert all(batch.dtype == np.int64 for batch in batches)
    assert all(batch.min() >= 0 and batch.max() < rows for batch in batches)


@pytest.mark.parametrize(("rows", "batch_size"), [(128, 8), (640, 4), (64, 4)])
def test_one_pass_sees_each_row_once_where_pools_divide_it(rows, batch_size):
    batches = _plan([1 + i % 30 for i in range(rows)], rows // batch_size, batch_size)
    assert sorted(np.concatenate(batches).tolist()) == list(range(rows))


@pytest.mark.parametrize(
    ("rows", "batch_size"),
    [
        (5, 8),
        (20, 4),
        (24, 8),
        (100, 8),
        (128, 8),
    ],
)
def test_no_row_comes_again_before_all_came(rows, batch_size):
    # A batch may span the end of one pass and the start of the next: then two passes are open.
    allowed = 1 if rows % min(rows, batch_size) == 0 else 2
    batches = _plan([1 + i % 30 for i in range(rows)], 40, batch_size)
    assert _worst_lead(batches, rows) <= allowed


@pytest.mark.parametrize(
    ("rows", "batch_size"),
    [
        (5, 8),
        (24, 8),
        (40, 4),
        (128, 8),
    ],
)
def test_no_row_is_twice_in_a_batch_where_batches_divide_the_rows(rows, batch_size):
    for batch in _plan([1 + i % 30 for i in range(rows)], 48, batch_size):
        assert len(set(batch.tolist())) == len(batch)


def test_a_client_with_fewer_rows_than_a_batch_trains_on_all_of_them_in_each_step():
    for batch in _plan([4, 9, 2], 10, 8):
        assert sorted(batch.tolist()) == [0, 1, 2]


def _of(seed: int, number: int, client: str) -> list[list[int]]:
    rng = client_rng(seed, number, client)
    return [b.tolist() for b in plan_batches(np.arange(50), 6, 8, rng)]


def test_batches_are_a_function_of_seed_round_and_client():
    first = _of(1, 2, "a")
    assert _of(1, 2, "a") == first
    others = [_of(2, 2, "a"), _of(1, 3, "a"), _of(1, 2, "b"), _of(2, 1, "a"), _of(1, 2, "a ")]
    assert all(other != first for other in others)
    assert len({str(other) for other in others}) == len(others)


def test_batches_stay_what_they_are_from_version_to_version():
    # A round that is repeated after a crash, perhaps by a newer fedtune, repeats its batches.
    digest = int.from_bytes(bytes.fromhex("ca978112ca1bbdca"), "little")  # SHA-256 of "a"
    expected = np.random.default_rng([1, 2, digest]).integers(2**32, size=4)
    assert client_rng(1, 2, "a").integers(2**32, size=4).tolist() == expected.tolist()


def test_rows_of_similar_length_share_a_batch():
    lengths = np.random.default_rng(0).integers(1, 128, 512)

    def padded(batches: list[np.ndarray]) -> int:
        return sum(int(lengths[b].max()) * len(b) for b in batches)

    ours = padded(_plan(lengths.tolist(), 64, 8))
    order = np.random.default_rng(1).permutation(512).reshape(64, 8)
    theirs = padded(list(order))
    real = int(lengths.sum())
    assert real <= ours
    # Of what random batches pad, at most a fifth is left.
    assert ours - real < 0.2 * (theirs - real)


def test_batches_are_not_in_order_of_length():
    lengths = np.arange(1, 129)
    firsts = [int(batch.max()) for batch in _plan(lengths.tolist(), 16, 8)]
    assert firsts != sorted(firsts)
    assert firsts != sorted(firsts, reverse=True)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_learning_rate_falls_from_lr_to_the_final_fraction(schedule):
    rates = [learning_rate(schedule, 0.02, 0.1, position, 11) for position in range(11)]
    assert rates[0] == pytest.approx(0.02)
    assert rates[-1] == pytest.approx(0.002)
    assert rates[5] == pytest.approx(0.011)  # both are half-way down in the middle
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))


def test_learning_rate_is_linear_or_torchs_cosine_or_constant():
    import torch

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7, eta_min=0.06)
    for position in range(8):
        assert learning_rate("linear", 0.3, 0.2, position, 8) == pytest.approx(
            0.3 - 0.24 * position / 7
        )
        assert learning_rate("cosine", 0.3, 0.2, position, 8) == pytest.approx(
            optimizer.param_groups[0]["lr"]
        )
        assert learning_rate("constant", 0.3, 0.2, position, 8) == 0.3
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_single_round_has_the_first_rate(schedule):
    assert learning_rate(schedule, 0.3, 0.0, 0, 1) == 0.3
