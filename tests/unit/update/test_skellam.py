"""Skellam noise against scipy's Skellam distribution, to the tails."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import special, stats

from fedtune.errors import ConfigError
from fedtune.update.skellam import SkellamNoise, SkellamTable, skellam_table

# 10⁻⁹ for one test statistic, of which there are a few dozen.
Z = float(stats.norm.isf(0.5e-9))
RARE = 1e-9


def _skellam(variance):
    return stats.skellam(variance / 2, variance / 2)


def _entries(table):
    return [
        int(high) << 64 | int(low)
        for high, low in zip(table.high.tolist(), table.low.tolist(), strict=True)
    ]


def _pmf(table):
    """Exact differences of the table's entries, as float64: from `first` to the last value."""
    steps = [0, *_entries(table), 1 << 128]
    return np.array([(b - a) / 2**128 for a, b in pairwise(steps)])


def _beyond(bound, variance):
    """P(|X| > bound) by scipy's Bessel functions: scipy's own sf ends at 10⁻¹⁶."""
    values = bound + np.arange(1, 100 + int(20 * math.sqrt(variance)))
    return 2 * special.ive(values, variance).sum()


@pytest.mark.parametrize("variance", [1e-6, 0.01, 0.5, 3.0, 47.3, 1e4, 123456.789])
def test_table_is_the_distribution_of_scipy(variance):
    table = skellam_table(variance)
    pmf = _pmf(table)
    values = table.first + np.arange(pmf.size)
    assert values[0] == -values[-1]
    bessel = special.ive(np.abs(values), variance)
    # The first and the last entry hold the tails besides: less than 2⁻¹⁰⁰.
    np.testing.assert_allclose(pmf, bessel, rtol=1e-9, atol=2.0**-100)
    assert bessel.min() < 1e-25
    # The distribution itself says the same, as far as scipy computes it to nine digits.
    scipy = _skellam(variance).pmf(values)
    here = scipy > 1e-12
    np.testing.assert_allclose(pmf[here], scipy[here], rtol=1e-9)


@pytest.mark.parametrize("variance", [1e-6, 3.0, 123456.789])
def test_table_is_symmetric_to_the_last_bits(variance):
    entries = _entries(skellam_table(variance))
    sums = {a + b - (1 << 128) for a, b in zip(entries, reversed(entries), strict=True)}
    assert sums <= {-2, -1, 0}  # each was rounded down


@pytest.mark.parametrize("variance", [0.01, 3.0, 1e4])
def test_table_leaves_out_less_than_two_to_the_minus_100(variance):
    last = -skellam_table(variance).first
    assert 2.0**-110 < _beyond(last, variance) < 2.0**-100


def test_table_at_a_deviation_of_ten_thousand():
    table = skellam_table(1e8)
    pmf = _pmf(table)
    values = table.first + np.arange(pmf.size)
    assert float(pmf @ values**2.0) == pytest.approx(1e8, rel=1e-12)
    assert float(pmf @ values**4.0) == pytest.approx(3e16 + 1e8, rel=1e-12)  # 3v² + v
    assert abs(float(pmf @ values)) < 1e-8


def test_inversion_at_the_entries_and_between():
    # Two entries share a high word, so the low word decides; the last has it nearly all.
    entries = [5, (7 << 64) + 3, (7 << 64) + 9, (2**64 - 1 << 64) + 2]
    words = np.array([divmod(entry, 1 << 64) for entry in entries], np.uint64)
    table = SkellamTable(-2, words[:, 0].copy(), words[:, 1].copy())
    points = [0, 2**128 - 1, 7 << 64, 8 << 64]
    points += [entry + step for entry in entries for step in (-1, 0, 1)]
    high, low = np.array([divmod(point, 1 << 64) for point in points], np.uint64).T
    wanted = [-2 + sum(entry <= point for entry in entries) for point in points]
    assert table.invert(high, low).tolist() == wanted


@pytest.mark.parametrize("variance", [0.3, 3.0, 2000.0])
def test_samples_are_skellam(variance):
    n = 200_000
    samples = SkellamNoise(variance).sample(n)
    assert samples.dtype == np.int64
    assert samples.shape == (n,)
    assert abs(samples.mean()) < Z * math.sqrt(variance / n)
    # Fourth cumulant of Skellam noise: its variance.
    spread = math.sqrt((2 * variance**2 + variance) / n)
    assert abs((samples.astype(float) ** 2).mean() - variance) < Z * spread
    distribution = _skellam(variance)
    edge = int(distribution.isf(100 / n))
    values = np.arange(-edge, edge + 1)
    expected = np.array(
        [distribution.cdf(-edge - 1), *distribution.pmf(values), distribution.sf(edge)]
    )
    clipped = np.clip(samples, -edge - 1, edge + 1) + edge + 1
    counts = np.bincount(clipped, minlength=expected.size)
    assert stats.chisquare(counts, expected / expected.sum() * n).pvalue > RARE


def test_samples_are_new_each_time():
    noise = SkellamNoise(1e6)
    assert noise.sample(20).tolist() != noise.sample(20).tolist()


def test_samples_of_neighbouring_coordinates_are_not_correlated():
    n = 400_000  # more than one chunk
    samples = SkellamNoise(50.0).sample(n) / math.sqrt(50.0)
    for lag in (1, 1 << 17, 1 << 18):
        product = samples[:-lag] * samples[lag:]
        assert abs(product.mean()) < Z / math.sqrt(product.size)


@pytest.mark.parametrize("present", [3, 4, 7])
def test_the_fewest_survivors_noise_reaches_the_target(present):
    target, fewest, n = 900.0, 3, 100_000
    share = SkellamNoise(target / fewest)
    total = np.sum([share.sample(n) for _ in range(present)], axis=0).astype(float)
    variance = target * present / fewest
    spread = Z * math.sqrt((2 * variance**2 + variance) / n)
    assert abs((total**2).mean() - variance) < spread
    assert (total**2).mean() > target - spread
    # And it is not only the variance: the sum is Skellam noise, here seen at its quartiles.
    quartile = int(_skellam(variance).ppf(0.75))
    p = float(_skellam(variance).sf(quartile))
    assert abs((total > quartile).mean() - p) < Z * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("variance", [0.01, 1.0, 77.0, 1e4])
@pytest.mark.parametrize("clients", [1, 10, 1000])
def test_tail_bounds_the_sum_and_not_by_much(variance, clients):
    bound = SkellamNoise(variance).tail(clients)
    assert _beyond(bound, variance * clients) <= 2.0**-64
    # Chernoff's bound is off by a small factor: 5 per cent less is already too little.
    assert _beyond(int(0.95 * bound) - 1, variance * clients) > 2.0**-64


def test_tail_of_much_noise_is_that_of_a_normal():
    # P(|X| > x) ≤ 2 exp(-x²/2σ²) at 2⁻⁶⁴
    deviations = math.sqrt(2 * 65 * math.log(2))
    assert SkellamNoise(1e8).tail(100) == pytest.approx(deviations * 1e5, rel=1e-6)


@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan, math.inf, 1e-7])
def test_no_variance_that_is_not_positive(variance):
    with pytest.raises(ConfigError, match="variance"):
        SkellamNoise(variance)


def test_too_much_noise_for_a_table():
    assert 2 * -skellam_table(1e6).first < 1 << 22
    SkellamNoise(3.0e10)
    with pytest.raises(ConfigError, match="200000"):
        SkellamNoise(4.0e10)
