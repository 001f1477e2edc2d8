"""Partitions against `flwr-datasets`, and what is said where none is possible."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data import PartitionSpec, partition
from fedtune.errors import DataError

VECTORS = json.loads(
    Path(__file__).with_name("vectors").joinpath("flwr_datasets.json").read_text("utf-8")
)


def split(labels, spec, clients, seed=0, min_size=1, *, column=None):
    """`partition` with lists in and out."""
    parts = partition(
        np.array(labels, np.int64), PartitionSpec.parse(spec), clients, seed, min_size, column
    )
    assert all(part.dtype == np.int64 for part in parts)
    return [part.tolist() for part in parts]


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "shards"])
@pytest.mark.parametrize("labels", VECTORS["labels"])
def test_same_rows_as_flwr_datasets(kind, labels):
    cases = [c for c in VECTORS["cases"] if c["labels"] == labels and c["spec"].startswith(kind)]
    assert cases
    for case in cases:
        arguments = [case[name] for name in ("spec", "clients", "seed", "min_size")]
        if case["parts"] is None:
            with pytest.raises(DataError):
                split(VECTORS["labels"][labels], *arguments)
        else:
            assert split(VECTORS["labels"][labels], *arguments) == case["parts"], arguments


@pytest.mark.parametrize("case", VECTORS["natural_ids"], ids=["names", "integers"])
def test_same_columns_as_flwr_datasets(case):
    parts = split([0] * 40, "column:id", len(case["names"]), column=case["column"])
    assert parts == case["parts"]
    assert [case["column"][part[0]] for part in parts] == case["names"]


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    spec=st.sampled_from(["iid", "dirichlet:0.5", "dirichlet:5", "shards:1", "shards:3"]),
    clients=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
    min_size=st.integers(1, 4),
)
def test_disjoint_large_enough_and_complete(labels, spec, clients, seed, min_size):
    try:
        parts = split(labels, spec, clients, seed, min_size)
    except DataError:
        return
    rows = sorted(row for part in parts for row in part)
    assert len(parts) == clients
    assert min(map(len, parts)) >= min_size
    assert len(set(rows)) == len(rows)
    if spec.startswith("shards"):
        # What `clients · shards` does not divide is dropped, and nothing else.
        shards = clients * int(spec[-1])
        assert set(rows) <= set(range(len(labels)))
        assert len(rows) == len(labels) // shards * shards
    else:
        assert rows == list(range(len(labels)))


@given(st.integers(1, 300), st.integers(1, 20), st.integers(0, 99))
def test_iid_sizes_differ_by_one_at_most(rows, clients, seed):
    if rows >= clients:
        sizes = [len(part) for part in split([0] * rows, "iid", clients, seed)]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1


def test_large_alpha_is_nearly_even_and_small_alpha_is_not():
    labels = np.repeat(np.arange(4), 1000)
    # A share has standard deviation sqrt(1/4 · 3/4 / (4 alpha + 1)): 0.7 % for alpha = 1000.
    even = [np.bincount(labels[part], minlength=4) for part in split(labels, "dirichlet:1000", 4)]
    assert np.abs(np.array(even) - 250).max() < 5 * 7
    skewed = [np.bincount(labels[part], minlength=4) for part in split(labels, "dirichlet:0.05", 4)]
    assert np.array(skewed).max() > 900


REFUSALS = [  # rows, spec, clients, min_size, what the advice must name
    (10, "iid", 11, 1, "clients <= 10"),
    (10, "iid", 4, 3, "clients <= 3"),
    (10, "shards:2", 6, 1, "clients <= 5 or shards:1"),
    (9, "shards:5", 4, 1, "clients <= 1 or shards:2"),
    (10, "shards:20", 2, 1, "shards:5"),
    (10, "shards:20", 20, 2, "shards:2 with clients = 5"),
    (12, "shards:1", 5, 3, "clients <= 4"),
    (40, "dirichlet:0.01", 6, 3, "dirichlet:"),
    (10, "dirichlet:1", 30, 1, "clients = "),
    (3, "dirichlet:1", 2, 3, "clients = 1 "),
    (3, "iid", 2, 4, "lower the minimum"),
    (0, "iid", 2, 1, "add data"),
]


@pytest.mark.parametrize(("rows", "spec", "clients", "min_size", "advice"), REFUSALS)
def test_refusal_names_numbers_and_a_setting_that_works(rows, spec, clients, min_size, advice):
    labels = [row % 3 for row in range(rows)]
    with pytest.raises(DataError) as caught:
        split(labels, spec, clients, min_size=min_size)
    text = str(caught.value)
    assert str(rows) in text
    assert advice in text
    assert "\n" not in text
    # Every setting that is named is tried.
    named = text.partition("; ")[2]
    count = re.search(r"clients <?= (\d+)", named)
    other = re.search(r"(shards|dirichlet):[\d.]+", named)
    if count and not (other and "with" in named):
        split(labels, spec, int(count[1]), min_size=min_size)
    if other:
        split(
            labels, other[0], int(count[1]) if count and "with" in named else clients, 0, min_size
        )


def test_largest_number_of_clients_is_the_largest():
    for rows in range(1, 30):
        for spec, clients in (("iid", 40), ("shards:3", 40)):
            with pytest.raises(DataError) as caught:
                split([0] * rows, spec, clients, min_size=1)
            most = re.search(r"clients <= (\d+)", str(caught.value))
            if most:
                with pytest.raises(DataError):
                    split([0] * rows, spec, int(most[1]) + 1)


def test_column_refusals():
    with pytest.raises(DataError, match=r"2 distinct values, but 3 clients .* set it to 2"):
        split([0, 0, 0], "column:site", 3, column=["a", "b", "b"])
    with pytest.raises(DataError, match=r"client 'a' .* 1 training rows.* minimum to 1"):
        split([0, 0, 0], "column:site", 2, min_size=2, column=["a", "b", "b"])
    with pytest.raises(ValueError, match="each of 3 rows"):
        split([0, 0, 0], "column:site", 1)


@pytest.mark.parametrize(("clients", "min_size"), [(0, 1), (-1, 1), (1, 0)])
def test_no_clients_and_empty_clients_are_refused(clients, min_size):
    with pytest.raises(DataError, match="or more"):
        split([0, 1], "iid", clients, min_size=min_size)
