"""Directions: their bits against another implementation, their geometry against closed forms."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.train.directions import Directions
from fedtune.types import Manifest

# As peft names them: six values of LoRA's A, 130 of its B, and a head of 70.
SHAPES = (
    ("x.0.lora_A.weight", (2, 3)),
    ("x.0.lora_B.weight", (50, 2)),
    ("x.1.lora_B.weight", (15, 2)),
    ("head.weight", (5, 13)),
    ("head.bias", (5,)),
)
MANIFEST = Manifest.of(SHAPES)
A, B, HEAD = slice(0, 6), slice(6, 136), slice(136, 206)
START = np.linspace(-1, 1, MANIFEST.size, dtype=np.float32)


def _directions(seed: int = 3, count: int = 64, start: np.ndarray = START) -> Directions:
    return Directions(MANIFEST, start, seed, count)


def _vector(directions: Directions, number: int) -> np.ndarray:
    """Direction `number`, of length 1."""
    zero = np.zeros(MANIFEST.size, np.float32)
    return directions.move(zero, number, 1.0)


def _philox(counter: int, key: tuple[int, int]) -> list[int]:
    """A block of Philox4x64-10, after Salmon et al. 2011, section 3.3, in plain integers."""
    mask = (1 << 64) - 1
    x0, x1, x2, x3 = counter, 0, 0, 0
    k0, k1 = key
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * x0, 0xCA5A826395121157 * x2
        x0, x1, x2, x3 = (high >> 64) ^ x1 ^ k0, high & mask, (low >> 64) ^ x3 ^ k1, low & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return [x0, x1, x2, x3]


def test_the_other_implementation_has_the_published_answer() -> None:
    """The known answer of Random123 for counter and key zero."""
    assert [f"{word:016x}" for word in _philox(0, (0, 0))] == [
        "16554d9eca36314c",
        "db20fe9d672d0fdc",
        "d7e772cee186176b",
        "7e68b68aec7ba23b",
    ]


@pytest.mark.parametrize(("seed", "number"), [(0, 0), (3, 41), (2**32 - 1, 63)])
def test_signs_are_the_bits_of_philox(seed: int, number: int) -> None:
    """numpy counts up before it computes a block, so the first has counter 1."""
    part = _vector(_directions(seed), number)
    kind = B if number % 2 else HEAD
    size = kind.stop - kind.start
    words = [word for block in (1, 2, 3) for word in _philox(block, (seed, number))]
    bits = [(words[place // 64] >> (place % 64)) & 1 for place in range(size)]
    expected = (2 * np.array(bits) - 1) / np.sqrt(size)
    np.testing.assert_allclose(part[kind], expected, rtol=1e-6)


def test_they_stay_as_they_are() -> None:
    """Adapters that were trained before depend on it."""
    signs = b"".join(
        np.packbits(_vector(_directions(), number) > 0).tobytes() for number in range(64)
    )
    assert (
        hashlib.sha256(signs).hexdigest()
        == "9f6fecdb725553d583ea4760c38d4114669cd7c7830dce68196d21c119a37568"
    )


def test_each_moves_the_head_or_the_b_matrices_and_none_the_a_matrices() -> None:
    for number in range(64):
        moved = _vector(_directions(), number) != 0
        expected = np.zeros(MANIFEST.size, bool)
        expected[B if number % 2 else HEAD] = True
        np.testing.assert_array_equal(moved, expected)


def test_without_a_head_all_move_the_b_matrices() -> None:
    manifest = Manifest.of(SHAPES[:3])
    directions = Directions(manifest, np.zeros(136, np.float32), 0, 8)
    for number in range(8):
        assert np.count_nonzero(directions.move(directions.start, number, 1.0)) == 130


def test_of_many_the_mean_of_their_squares_is_the_identity() -> None:
    """E[z zᵀ] = I/d: off the diagonal a mean of n random signs, within 5 of its deviations."""
    n, d = 4000, HEAD.stop - HEAD.start
    directions = _directions(count=2 * n)
    z = np.array([_vector(directions, 2 * k)[HEAD] for k in range(n)], np.float64)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-6)
    second = d * z.T @ z / n
    assert np.abs(second - np.eye(d)).max() < 5 / np.sqrt(n)
    # The sum of d(d-1)/2 squares, each of expectation 1/n.
    off = second[np.triu_indices(d, 1)]
    assert n * np.mean(off**2) == pytest.approx(1, rel=5 * np.sqrt(2 / len(off)))


@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_expanding_is_linear(seed: int, data: st.DataObject) -> None:
    values = st.lists(st.floats(-10, 10, width=32), min_size=9, max_size=9)
    a, b = (np.array(data.draw(values), np.float32) for _ in range(2))
    directions = _directions(seed, 9)
    both = directions.expand(a + b).astype(np.float64)
    apart = directions.expand(a).astype(np.float64) + directions.expand(b) - START
    np.testing.assert_allclose(both, apart, atol=2e-5)


def test_expanding_is_the_sum_of_the_moves() -> None:
    directions = _directions(count=9)
    coordinates = np.random.default_rng(0).normal(size=9).astype(np.float32)
    moved = START
    for number, length in enumerate(coordinates):
        moved = directions.move(moved, number, float(length))
    np.testing.assert_allclose(directions.expand(coordinates), moved, atol=1e-6)
    matrix = np.array([_vector(directions, number) for number in range(9)], np.float64)
    np.testing.assert_allclose(moved, START + coordinates @ matrix, atol=1e-6)


def test_what_is_given_back_belongs_to_who_asked() -> None:
    """The last answer is remembered, and must not be changed from outside."""
    directions = _directions(count=9)
    for coordinates in (np.zeros(9, np.float32), np.ones(9, np.float32)):
        first = directions.expand(coordinates)
        expected = first.copy()
        first += 1
        np.testing.assert_array_equal(directions.expand(coordinates), expected)
    np.testing.assert_array_equal(directions.expand(np.zeros(9, np.float32)), START)


def test_coordinates_of_another_start_or_seed_have_another_manifest() -> None:
    shifted = START.copy()
    shifted[0] = np.nextafter(shifted[0], np.float32(2))
    found = [
        _directions(),
        _directions(seed=4),
        _directions(count=65),
        _directions(start=shifted),
        Directions(Manifest.of([("y", (206,))]), START, 3, 64),
    ]
    assert len({directions.manifest.digest for directions in found}) == 5
    assert _directions().manifest == _directions().manifest
    assert [tensor.shape for tensor in _directions().manifest.tensors] == [(64,)]


@pytest.mark.parametrize("size", [0, 8, 10])
def test_coordinates_of_another_number_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="coordinates"):
        _directions(count=9).expand(np.zeros(size, np.float32))
    with pytest.raises(ValueError, match="start"):
        _directions(start=np.zeros(size, np.float32))
