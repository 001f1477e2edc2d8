"""Weights as 8-bit integers: a closed bound on what rounding does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedtune.edge.build.int8 import LEVELS, round_weight

WEIGHTS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    elements=st.floats(-1e4, 1e4, width=32),
)


@pytest.mark.parametrize("axis", [0, 1])
@given(WEIGHTS)
def test_no_value_moves_by_more_than_half_a_level(axis: int, weight: np.ndarray):
    integers, scale = round_weight(weight, axis)
    assert integers.dtype == np.int8
    assert scale.shape == tuple(n if place == axis else 1 for place, n in enumerate(weight.shape))
    largest = np.abs(weight).max(axis=1 - axis, keepdims=True)
    off = np.abs(integers.astype(np.float32) * scale - weight)
    assert (off <= largest / (2 * LEVELS) * 1.001 + 1e-30).all()
    assert np.abs(integers.astype(int)).max() <= LEVELS


def test_the_largest_value_of_each_output_is_kept():
    weight = np.array([[1.0, -8.0], [-4.0, 2.0], [0.0, 0.0]], np.float32)
    integers, scale = round_weight(weight, 1)
    np.testing.assert_array_equal(integers, [[32, -127], [-127, 32], [0, 0]])
    np.testing.assert_allclose(scale, [[4 / 127, 8 / 127]], rtol=1e-6)
