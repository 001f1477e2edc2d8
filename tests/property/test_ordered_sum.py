"""A sum that does not depend on the order of arrival, to the last bit."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.aggregate import OrderedSum

VALUES = st.floats(-(2.0**66), 2.0**66, width=32)
ITEMS = st.lists(
    st.tuples(st.none() | st.lists(VALUES, min_size=3, max_size=3), st.integers(1, 10**6)),
    min_size=1,
    max_size=8,
)


def fill(items, order):
    total = OrderedSum(3, len(items))
    for place in order:
        assert not total.complete
        update, weight = items[place]
        if update is None:
            total.skip(place)
        else:
            total.add(place, np.array(update, np.float32), weight)
    assert total.complete
    return total


@given(ITEMS, st.data())
def test_bit_identical_for_every_order_of_arrival(items, data):
    in_order = fill(items, range(len(items)))
    other = fill(items, data.draw(st.permutations(range(len(items)))))
    assert other.total.tobytes() == in_order.total.tobytes()
    assert other.weight == in_order.weight


@given(ITEMS, st.data())
def test_equals_the_exact_sum(items, data):
    result = fill(items, data.draw(st.permutations(range(len(items)))))
    there = [(update, weight) for update, weight in items if update is not None]
    assert result.weight == sum(weight for _, weight in there)
    for column in range(3):
        terms = [weight * update[column] for update, weight in there]
        scale = math.fsum(abs(term) for term in terms)
        assert abs(result.total[column] - math.fsum(terms)) <= 1e-12 * scale


@given(ITEMS, st.data())
def test_a_place_is_filled_once(items, data):
    order = data.draw(st.permutations(range(len(items))))
    result = fill(items, order)
    before = result.total.copy()
    for place in order:
        with pytest.raises(ValueError, match="place"):
            result.add(place, np.ones(3, np.float32), 1)
        with pytest.raises(ValueError, match="place"):
            result.skip(place)
    assert result.total.tobytes() == before.tobytes()


def test_a_place_that_waits_is_filled_already():
    result = OrderedSum(1, 3)
    result.add(2, np.ones(1, np.float32), 1)
    with pytest.raises(ValueError, match="place 2"):
        result.skip(2)


@pytest.mark.parametrize("place", [-1, 3])
def test_a_place_that_does_not_exist_is_refused(place):
    with pytest.raises(ValueError, match="place"):
        OrderedSum(1, 3).add(place, np.ones(1, np.float32), 1)


def test_float32_updates_are_summed_in_float64():
    # 2²⁴ + 1 is the first integer that float32 does not have.
    result = OrderedSum(1, 2)
    result.add(0, np.array([2.0**24], np.float32), 1)
    result.add(1, np.array([1.0], np.float32), 1)
    assert result.total.item() == 2**24 + 1
