"""The stratified test set."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data.holdout import hold_out
from fedtune.errors import DataError


def unique(count):
    return [f"text {i}" for i in range(count)]


@pytest.mark.parametrize(
    ("counts", "fraction", "held"),
    [
        ({"a": 100, "b": 50}, 0.2, {"a": 20, "b": 10}),
        ({"a": 10, "b": 10, "c": 10}, 0.1, {"a": 1, "b": 1, "c": 1}),
        ({"a": 2}, 0.5, {"a": 1}),
        ({"a": 100}, 0.29, {"a": 29}),  # although 0.29 * 100 < 29 in floating point
        ({"a": 4, "b": 1}, 0.5, {"a": 2}),  # b keeps its only row
        ({"a": 3, "b": 2}, 0.99, {"a": 2, "b": 1}),  # and everyone the last one
    ],
)
def test_counts_per_label(counts, fraction, held):
    labels = [label for label, count in counts.items() for _ in range(count)]
    for seed in range(5):
        _, test = hold_out(unique(len(labels)), [labels], fraction, seed)
        assert Counter(labels[i] for i in test) == held


def test_rare_labels_give_their_fraction_together():
    labels = [str(i // 2) for i in range(200)]
    _, test = hold_out(unique(200), [labels], 0.2, 0)
    # Each of 100 labels is due 0.4 rows: one in every five rows, and none loses both.
    assert len(test) == 40
    assert max(Counter(labels[i] for i in test).values()) == 1


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from("abc"), st.sampled_from("xyz")),
        min_size=1,
        max_size=60,
    ),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 1000),
)
def test_nothing_is_lost_and_no_text_is_on_both_sides(rows, fraction, seed):
    texts, labels, clients = ([str(row[k]) for row in rows] for k in range(3))
    try:
        train, test = hold_out(texts, [labels, clients], fraction, seed)
    except DataError:
        return
    assert sorted([*train, *test]) == list(range(len(rows)))
    assert train.tolist() == sorted(train)
    assert not {texts[i] for i in train} & {texts[i] for i in test}
    assert {labels[i] for i in train} == set(labels)
    assert {clients[i] for i in train} == set(clients)
    assert len(test) <= fraction * len(rows) + 1e-6


@given(
    labels=st.lists(st.sampled_from("aab"), min_size=10, max_size=80),
    fraction=st.floats(0.1, 0.6),
    seed=st.integers(0, 1000),
)
def test_each_label_gives_its_fraction_but_for_one_row(labels, fraction, seed):
    try:
        _, test = hold_out(unique(len(labels)), [labels], fraction, seed)
    except DataError:
        return
    held = Counter(labels[i] for i in test)
    for label, count in Counter(labels).items():
        if count * (1 - fraction) >= 2:
            assert abs(held[label] - fraction * count) < 2


def test_same_seed_same_rows_another_seed_others():
    labels = ["a", "b"] * 50
    first, again, other = (hold_out(unique(100), [labels], 0.2, seed)[1] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_label_names_are_not_confused():
    # NumPy strings drop trailing NULs; labels must not pass through them.
    labels = ["a", "a\x00"] * 10
    _, test = hold_out(unique(20), [labels], 0.2, 0)
    assert Counter(labels[i] for i in test) == {"a": 2, "a\x00": 2}


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_fraction_out_of_range(fraction):
    with pytest.raises(DataError, match="between 0 and 1"):
        hold_out(["x"] * 10, [["a"] * 10], fraction, 0)


def test_nothing_to_hold_out():
    for texts in (["x"], ["x"] * 10, unique(3)):
        with pytest.raises(DataError, match=f"of {len(texts)} rows"):
            hold_out(texts, [["a"] * len(texts)], 0.2, 0)
