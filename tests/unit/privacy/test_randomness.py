"""The secure stream: statistics at thresholds that chance passes all but once in a million runs."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from fedtune.privacy.randomness import SecureRandom

# 10⁻⁹ for one test statistic, of which there are a hundred.
Z = float(stats.norm.isf(0.5e-9))
RARE = 1e-9


def test_every_byte_is_equally_likely():
    counts = np.bincount(np.frombuffer(SecureRandom().bytes(1 << 20), np.uint8), minlength=256)
    assert stats.chisquare(counts).pvalue > RARE


@pytest.mark.parametrize("n", [0, 1, 15, 17, (1 << 20) - 1, (1 << 20) + 1])
def test_as_many_bytes_as_asked_for(n):
    assert len(SecureRandom().bytes(n)) == n


def test_the_stream_does_not_repeat():
    # Blocks of AES in counter mode under one key are all different; 16 bytes by chance never are.
    random = SecureRandom()
    data = b"".join(random.bytes(n) for n in (16, 160, 1 << 21, 16))
    blocks = np.frombuffer(data, "V16")
    assert len(set(blocks.tolist())) == blocks.size


def test_instances_differ():
    assert SecureRandom().bytes(16) != SecureRandom().bytes(16)


def test_every_bit_of_uint64_is_fair():
    words = SecureRandom().uint64(50_000)
    assert words.dtype == np.uint64
    ones = np.unpackbits(words.view(np.uint8)).reshape(-1, 64).sum(axis=0, dtype=np.int64)
    assert (np.abs(ones - 25_000) < Z * math.sqrt(50_000 / 4)).all()


def test_uniform_is_uniform_on_multiples_above_zero():
    values = SecureRandom().uniform(200_000)
    assert values.min() > 0
    assert values.max() <= 1
    assert stats.kstest(values, "uniform").pvalue > RARE
    scaled = [Fraction(value) * 2**53 for value in values[:2000].tolist()]
    assert all(value.denominator == 1 for value in scaled)
    # All 53 bits are there: one bit less would leave only even numbers.
    assert sum(int(value) % 2 for value in scaled) > 1000 - Z * math.sqrt(500)


def test_uniform_reaches_one_and_never_zero():
    class Ends(SecureRandom):
        def uint64(self, n):
            return np.array([0, 2**64 - 1], np.uint64)

    assert Ends().uniform(2).tolist() == [2.0**-53, 1.0]


@pytest.mark.parametrize("n", [100_001, 200_000])
def test_gaussian_is_standard_normal(n):
    values = SecureRandom().gaussian(n)
    assert values.shape == (n,)
    assert stats.kstest(values, "norm").pvalue > RARE
    assert abs(values.mean()) < Z / math.sqrt(n)
    assert abs(values.var() - 1) < Z * math.sqrt(2 / n)
    # The kurtosis tells four summed normals from, say, four summed uniforms.
    assert abs((values**4).mean() - 3) < Z * math.sqrt(96 / n)


def test_gaussian_values_are_not_correlated():
    # Cosine and sine of one angle are half a chunk apart, so are neighbours in time.
    values = SecureRandom().gaussian(1 << 17)
    for lag in (1, 2, 1 << 14, 1 << 15, 1 << 16):
        product = values[:-lag] * values[lag:]
        assert abs(product.mean()) < Z / math.sqrt(product.size)
        squares = (values[:-lag] ** 2 - 1) * (values[lag:] ** 2 - 1)
        assert abs(squares.mean()) < Z * 2 / math.sqrt(squares.size)


def test_gaussian_of_nothing_and_of_one():
    assert SecureRandom().gaussian(0).shape == (0,)
    assert SecureRandom().gaussian(1).shape == (1,)


def test_repr_shows_nothing_of_the_key():
    assert repr(SecureRandom()) == "SecureRandom()"


def test_cannot_be_copied_or_stored():
    with pytest.raises(TypeError):
        pickle.dumps(SecureRandom())
    with pytest.raises(TypeError):
        copy.deepcopy(SecureRandom())


def test_a_forked_process_has_another_stream(forked, tmp_path):
    random = SecureRandom()
    random.bytes(5)

    def child() -> None:
        (tmp_path / "child").write_bytes(random.bytes(32))

    assert forked(child) == 0
    assert (tmp_path / "child").read_bytes() != random.bytes(32)
