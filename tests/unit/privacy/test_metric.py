"""Noise for metric differential privacy: its distribution, its bound, and what it does to input.

Statistics are at thresholds that chance passes all but once in a hundred million runs.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import integrate, special, stats

from fedtune.errors import ConfigError, TrainingError
from fedtune.privacy.metric import MetricPrivacy, clip_scale, metric_noise
from fedtune.privacy.randomness import SecureRandom

Z = float(stats.norm.isf(0.5e-9))
RARE = 1e-9
WIDTHS = [1, 2, 3, 64, 576]

vectors = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=12).filter(lambda s: s[1] > 0),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)
clips = st.floats(1e-3, 1e3)


@pytest.mark.parametrize("shape", [1, 2, 5, 576])
def test_gamma_is_gamma(shape: int) -> None:
    values = SecureRandom().gamma(5_000, shape)
    assert values.shape == (5_000,)
    assert stats.kstest(values, "gamma", args=(shape,)).pvalue > RARE


def test_gamma_of_nothing_and_of_more_than_a_chunk() -> None:
    assert SecureRandom().gamma(0, 3).shape == (0,)
    assert (SecureRandom().gamma(3, 1 << 17) > 0).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("eta", [0.5, 80.0])
def test_lengths_of_noise_are_gamma(width: int, eta: float) -> None:
    lengths = np.linalg.norm(metric_noise(4_000, width, eta, SecureRandom()), axis=1)
    assert stats.kstest(lengths, "gamma", args=(width, 0, 1 / eta)).pvalue > RARE


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_directions_of_noise_are_uniform_on_the_sphere(width: int) -> None:
    n = 4_000
    noise = metric_noise(n, width, 3.0, SecureRandom())
    units = noise / np.linalg.norm(noise, axis=1, keepdims=True)
    # One coordinate u of a uniform point: (u + 1) / 2 is Beta((d-1)/2, (d-1)/2), along any axis.
    axes = [*np.eye(width)[:2], np.full(width, width**-0.5)]
    for axis in axes:
        half = ((units @ axis) + 1) / 2
        assert stats.kstest(half, "beta", args=((width - 1) / 2,) * 2).pvalue > RARE
    # All directions alike: the mean's squared length times n·d is about chi-squared of d degrees.
    assert stats.chi2.sf(n * width * (units.mean(0) ** 2).sum(), width) > RARE
    # Length and direction know nothing of each other.
    lengths = np.linalg.norm(noise, axis=1)
    assert abs(stats.spearmanr(lengths, units[:, 0]).statistic) < Z / math.sqrt(n - 1)


def test_rows_of_noise_know_nothing_of_each_other() -> None:
    noise = metric_noise(2_000, 8, 1.0, SecureRandom())
    cosine = (noise[1:] * noise[:-1]).sum(1)
    cosine /= np.linalg.norm(noise[1:], axis=1) * np.linalg.norm(noise[:-1], axis=1)
    # The variance of a cosine of two uniform directions is 1/d.
    assert abs(cosine.mean()) < Z / math.sqrt(8 * len(cosine))


def _density(z: np.ndarray, eta: float) -> np.ndarray:
    """exp(-eta ‖z‖), normed: over the sphere's area times Γ(d) / eta^d. float64 `[...]`."""
    d = z.shape[-1]
    area = 2 * math.pi ** (d / 2) / special.gamma(d / 2)
    return np.exp(-eta * np.linalg.norm(z, axis=-1)) * eta**d / (area * special.gamma(d))


def test_the_density_of_the_formula_is_one() -> None:
    whole, _ = integrate.dblquad(
        lambda y, x: float(_density(np.array([x, y]), 2.0)), -12, 12, -12, 12, epsabs=1e-6
    )
    assert whole == pytest.approx(1, abs=1e-4)


@given(
    hnp.arrays(np.float64, (3, 3), elements=st.floats(-5, 5)),
    st.floats(0.01, 20),
)
def test_two_vectors_are_told_apart_by_at_most_eta_times_their_distance(
    points: np.ndarray, eta: float
) -> None:
    first, second, seen = points
    ratio = _density(seen - first, eta) / _density(seen - second, eta)
    assert abs(math.log(ratio)) <= eta * np.linalg.norm(first - second) + 1e-9


def test_outcomes_of_two_vectors_keep_the_bound_and_reach_it() -> None:
    # Two vectors at the ends of a ball in the plane; how often is the outcome beyond either end?
    n, privacy = 200_000, MetricPrivacy(0.5, 1.5)
    ends = np.array([[5.0, 0.0], [-5.0, 0.0]], np.float32)  # clipped to ±0.5
    released = [privacy.release(np.repeat(end[None], n, 0), SecureRandom())[:, 0] for end in ends]
    for edge in (-1.5, -0.5, 0.5, 1.5):
        side = np.sign(edge)
        likely, unlikely = sorted(
            (np.count_nonzero(side * values > abs(edge)) for values in released), reverse=True
        )
        margin = Z * math.sqrt(1 / likely + 1 / unlikely)
        found = math.log(likely / unlikely)
        assert found <= privacy.epsilon + margin
    # Of the plane's half beyond 1.5: exactly the ratio of the formula, near the bound of 1.5.
    expected = math.log(_beyond(1.0, 1.5) / _beyond(2.0, 1.5))
    assert 0.8 * privacy.epsilon < expected < privacy.epsilon
    assert found == pytest.approx(expected, abs=margin)


def _beyond(distance: float, eta: float) -> float:
    """Chance that the first of two coordinates of noise is above `distance`."""
    found, _ = integrate.quad(
        lambda r: math.acos(distance / r) / math.pi * stats.gamma.pdf(r, 2, scale=1 / eta),
        distance,
        60 / eta,
    )
    return found


@given(vectors, clips)
def test_no_clipped_vector_is_longer_than_the_clip(rows: np.ndarray, clip: float) -> None:
    clipped = rows * clip_scale(rows, clip)[:, None]
    norms = np.linalg.norm(clipped, axis=1)
    assert (norms <= clip * (1 + 1e-12)).all()
    before = np.linalg.norm(rows.astype(np.float64), axis=1)
    assert np.allclose(norms, np.minimum(before, clip), rtol=1e-9, atol=0)
    assert np.array_equal(clipped[before <= clip], rows[before <= clip])


@given(
    hnp.arrays(np.float32, (2, 7), elements=st.floats(-1e6, 1e6, width=32)),
    clips,
)
def test_clipping_brings_no_two_vectors_further_apart(rows: np.ndarray, clip: float) -> None:
    clipped = rows * clip_scale(rows, clip)[:, None]
    apart = np.linalg.norm(rows[0].astype(np.float64) - rows[1])
    assert np.linalg.norm(clipped[0] - clipped[1]) <= min(apart, 2 * clip) * (1 + 1e-9) + 1e-9


@given(vectors, clips, st.floats(1e-3, 1e3))
def test_what_is_released_is_finite_and_of_the_same_shape(
    rows: np.ndarray, clip: float, eta: float
) -> None:
    found = MetricPrivacy(clip, eta).release(rows, SecureRandom())
    assert found.shape == rows.shape
    assert found.dtype == np.float32
    assert np.isfinite(found).all()


def test_what_is_released_is_the_clipped_vector_and_noise_of_the_right_size() -> None:
    # Noise on the norm alone, or of the size of one value, would leave the direction as it was.
    width, eta = 576, 80.0
    rows = np.random.default_rng(0).normal(size=(500, width)).astype(np.float32)
    privacy = MetricPrivacy(3.0, eta)
    noise = privacy.release(rows, SecureRandom()) - rows * clip_scale(rows, 3.0)[:, None]
    lengths = np.linalg.norm(noise, axis=1)
    assert stats.kstest(lengths, "gamma", args=(width, 0, 1 / eta)).pvalue > RARE
    along = (noise * rows).sum(1) / (lengths * np.linalg.norm(rows, axis=1))
    assert stats.kstest((along + 1) / 2, "beta", args=((width - 1) / 2,) * 2).pvalue > RARE


def test_a_vector_of_zeros_is_hidden_like_any_other() -> None:
    zeros = np.zeros((3, 5), np.float32)
    assert (clip_scale(zeros, 1.0) == 1).all()
    found = MetricPrivacy(1.0, 10.0).release(zeros, SecureRandom())
    assert len({row.tobytes() for row in found}) == 3
    assert (np.linalg.norm(found, axis=1) > 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_never_released(value: float) -> None:
    rows = np.ones((4, 3), np.float32)
    rows[2, 1] = value
    with pytest.raises(TrainingError, match="1 of 4"):
        MetricPrivacy(1.0, 1.0).release(rows, SecureRandom())


@pytest.mark.parametrize(
    ("clip", "eta"), itertools.product([1.0, 0.0, -1.0, math.inf, math.nan], repeat=2)
)
def test_a_clip_and_an_eta_are_positive_numbers(clip: float, eta: float) -> None:
    if clip == eta == 1.0:
        assert MetricPrivacy(clip, eta).epsilon == 2.0
    else:
        with pytest.raises(ConfigError):
            MetricPrivacy(clip, eta)
