"""No update, however extreme, is longer than the bound once it is integers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import ConfigError
from fedtune.update.quantize import Quantizer

MOST = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).smallest_subnormal)
CLIPS = st.sampled_from([1e-30, 1e-3, 1.0, 2.5, 1e4, 1e30])
SEEDS = st.integers(0, 2**32)


def one_hot(size: int) -> list[float]:
    return [MOST] + [0.0] * (size - 1)


def alternating(size: int) -> list[float]:
    return [(-1.0) ** i for i in range(size)]


SPECIAL = st.integers(1, 600).flatmap(
    lambda size: st.sampled_from(
        [
            [0.0] * size,
            one_hot(size),
            [-v for v in one_hot(size)],
            [TINY] * size,
            alternating(size),
            [MOST * v for v in alternating(size)],
            [0.5] * size,
        ]
    )
)
UPDATES = SPECIAL | st.lists(
    st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=60
)


class AlwaysUp:
    """A generator whose every draw rounds away from the floor, so that all attempts fail."""

    def random(self, n: int) -> np.ndarray:
        return np.zeros(n)


def squares(vector: np.ndarray) -> int:
    return sum(int(value) ** 2 for value in vector.tolist())


def quantizer(size: int, clip: float, bits: int, weighting: str = "clients") -> Quantizer:
    return Quantizer(size, clip, bits, weighting, 1000, False, None)


@given(UPDATES, CLIPS, st.integers(9, 30), st.integers(1, 2000), SEEDS)
def test_norm_is_within_the_bound(values, clip, bits, examples, seed):
    update = np.array(values, np.float32)
    for weighting in ("clients", "examples"):
        one = quantizer(len(values), clip, bits, weighting)
        vector = one.encode(update, examples, 0.0, np.random.default_rng(seed))
        assert squares(vector[: len(values)]) <= one.bound**2
        assert abs(vector).max() <= one.bound


@given(UPDATES, CLIPS, st.integers(9, 30))
def test_norm_is_within_the_bound_however_the_dice_fall(values, clip, bits):
    one = quantizer(len(values), clip, bits)
    vector = one.encode(np.array(values, np.float32), 1, 0.0, AlwaysUp())
    assert squares(vector) <= one.bound**2


@given(st.integers(1, 400), st.floats(0.01, 100), st.integers(9, 16), SEEDS)
def test_norm_exactly_at_the_clip(size, clip, bits, seed):
    rng = np.random.default_rng(seed)
    update = rng.normal(size=size)
    update = (update * clip / np.linalg.norm(update)).astype(np.float32)
    one = quantizer(size, clip, bits)
    length = math.sqrt(squares(one.encode(update, 1, 0.0, rng)))
    # Between the shortened target, less what rounding can take away, and the bound.
    assert one.scale * clip - math.sqrt(size) - 1 <= length <= one.bound


@given(st.integers(1, 300), SEEDS)
def test_rounding_up_everywhere_would_be_too_long(size, seed):
    # The inequality that makes the attempts needed: without them the bound does not hold.
    one = quantizer(size, 1.0, 9)
    update = np.full(size, 1 / math.sqrt(size), np.float32)
    up = np.ceil(update.astype(float) * one.scale)
    vector = one.encode(update, 1, 0.0, np.random.default_rng(seed))
    assert squares(vector) <= one.bound**2
    assert squares(one.encode(update, 1, 0.0, AlwaysUp())) <= min(squares(up), one.bound**2)


@given(
    st.lists(st.tuples(SEEDS, st.integers(1, 5000), st.floats(0, 100)), min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from(["examples", "clients"]),
)
def test_sums_in_a_ring_of_the_stated_bits_are_exact(clients, metrics, weighting):
    one = Quantizer(9, 1.0, 9, weighting, 1000, metrics, None)
    vectors = []
    for seed, examples, loss in clients:
        rng = np.random.default_rng(seed)
        update = rng.normal(size=9).astype(np.float32)
        vectors.append(one.encode(update, examples, loss, rng))
    modulus = 1 << one.ring_bits(len(vectors))
    wrapped = sum(vector % modulus for vector in vectors) % modulus
    total = np.where(wrapped >= modulus // 2, wrapped - modulus, wrapped)
    np.testing.assert_array_equal(total, sum(vectors))
    result = one.decode(total, len(vectors))
    counts = [examples for _, examples, _ in clients]
    capped = sum(min(count, 1000) for count in counts)
    assert result.weight == (capped / 1000 if weighting == "examples" else len(clients))
    if metrics:
        assert result.examples == sum(counts)
        loss = sum(examples * loss for _, examples, loss in clients) / sum(counts)
        assert result.loss == pytest.approx(loss, abs=1e-3)
    assert np.linalg.norm(result.total) <= len(clients) * (1 + 1e-9) * one.bound / one.scale


@given(st.integers(1, 10**12), st.integers(9, 30))
def test_bits_are_accepted_exactly_where_half_the_norm_is_left(size, bits):
    bound = 2 ** (bits - 1) - 1
    half = bound / 2
    enough = half**2 + size / 4 + half + math.sqrt(size) / 2 <= bound**2
    if enough:
        assert quantizer(size, 1.0, bits).bound == bound
    else:
        with pytest.raises(ConfigError):
            quantizer(size, 1.0, bits)
