"""Quantized updates: what is encoded, what the sum says, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fedtune.errors import ConfigError, MalformedMessage, TrainingError
from fedtune.update.quantize import Quantizer, shrunk_norm
from fedtune.update.skellam import SkellamNoise

# Two-sided, 10⁻⁹ for one test statistic: the file gives a false alarm in 10⁷ runs.
Z = float(stats.norm.isf(0.5e-9))


def _quantizer(size=10, **other):
    settings = {
        "size": size,
        "clip": 2.0,
        "bits": 16,
        "weighting": "examples",
        "example_cap": 1000,
        "metrics": True,
        "noise": None,
    }
    return Quantizer(**{**settings, **other})


def _rng(seed=0):
    return np.random.default_rng(seed)


def _updates(count, size, norm, seed=0):
    updates = _rng(seed).normal(size=(count, size))
    return (updates * norm / np.linalg.norm(updates, axis=1, keepdims=True)).astype(np.float32)


# ------------------------------------------------------------------------------ the norm
@pytest.mark.parametrize("size", [1, 2, 100, 12345, 1_000_000])
@pytest.mark.parametrize("bits", [12, 16, 24])
def test_shrunk_norm_solves_its_equation(size, bits):
    bound = 2 ** (bits - 1) - 1
    shrunk = shrunk_norm(bound, size)
    if 4 * bound**2 <= size + 2 * math.sqrt(size):
        assert shrunk == 0
    else:
        left = shrunk**2 + size / 4 + shrunk + math.sqrt(size) / 2
        assert left == pytest.approx(bound**2, rel=1e-12)


def test_a_clipped_update_is_about_bound_long():
    for norm in (2.0, 100.0):
        vector = _quantizer(50, metrics=False, weighting="clients").encode(
            _updates(1, 50, norm)[0], 1, 0.0, _rng()
        )
        assert 32767 * 0.9999 < math.sqrt(int(vector @ vector)) <= 32767


def test_a_short_update_is_not_stretched():
    quantizer = _quantizer(4, weighting="clients", metrics=False)
    update = np.array([0.5, -0.25, 0.125, 0.0], np.float32)
    vector = quantizer.encode(update, 1, 0.0, _rng())
    # Half a unit is lost to the room that rounding needs: see shrunk_norm.
    np.testing.assert_allclose(vector, update * 32766 / 2, atol=1.01)


def test_rounding_is_unbiased():
    quantizer = _quantizer(3, weighting="clients", metrics=False)
    update = np.array([0.3e-4, -1.7e-4, 0.0], np.float32)
    rng, n = _rng(1), 20_000
    vectors = np.array([quantizer.encode(update, 1, 0.0, rng) for _ in range(n)])
    exact = update.astype(float) * quantizer.scale
    assert (np.abs(vectors - exact) < 1).all()
    deviation = np.sqrt((exact - np.floor(exact)) * (np.ceil(exact) - exact))
    assert (np.abs(vectors.mean(axis=0) - exact) <= Z * deviation / math.sqrt(n)).all()


@pytest.mark.parametrize("size", [1, 100, 20_000])
def test_at_the_clip_there_is_room_to_round(size):
    # Without it, all attempts would end beyond the bound and rounding towards zero would take
    # most of an update whose values are below one unit.
    quantizer = _quantizer(size, bits=9, weighting="clients", metrics=False)
    update = _updates(1, size, 2.0)[0]
    direction = update.astype(float) / np.linalg.norm(update.astype(float))
    along = quantizer.encode(update, 1, 0.0, _rng()) @ direction
    # Independent roundings of variance 1/4 at most.
    assert abs(along - 2.0 * quantizer.scale) < Z / 2
    assert abs(2.0 * quantizer.scale - 255) < 255 / 2


def test_a_weight_shortens_in_proportion():
    updates = _updates(1, 2000, 1.0)[0]
    quantizer = _quantizer(2000, bits=24, example_cap=100)
    lengths = {
        n: float(np.linalg.norm(quantizer.encode(updates, n, 0.0, _rng())[:2000]))
        for n in (25, 100, 900)
    }
    assert lengths[25] == pytest.approx(lengths[100] / 4, rel=1e-5)
    assert lengths[900] == pytest.approx(lengths[100], rel=1e-5)
    assert lengths[100] == pytest.approx(quantizer.bound / 2, rel=1e-3)


# ------------------------------------------------------------------------------ the sum
def test_the_sum_is_the_weighted_mean_and_its_metrics():
    size, counts, losses = 40, [10, 300, 1500, 70_000], [0.5, 1.25, 0.0, 3.0]
    updates = _updates(4, size, 1.9)
    quantizer = _quantizer(size, bits=24, example_cap=1000)
    total = sum(
        quantizer.encode(u, n, loss, _rng(n))
        for u, n, loss in zip(updates, counts, losses, strict=True)
    )
    result = quantizer.decode(total, 4)
    weights = np.minimum(counts, 1000)
    assert result.weight == sum(weights) / 1000
    assert result.examples == sum(counts)
    assert result.loss == np.average(losses, weights=counts)  # all are multiples of 1/1024
    mean = np.average(updates.astype(float), axis=0, weights=weights)
    np.testing.assert_allclose(result.total / result.weight, mean, atol=4 / quantizer.scale)


def test_the_sum_by_clients_is_the_plain_mean():
    size, updates = 40, _updates(3, 40, 1.9)
    quantizer = _quantizer(size, bits=24, weighting="clients", metrics=False)
    assert quantizer.slots == size
    total = sum(quantizer.encode(u, 7 + i, 1.0, _rng(i)) for i, u in enumerate(updates))
    result = quantizer.decode(total, 3)
    assert (result.weight, result.examples, result.loss) == (3.0, None, None)
    np.testing.assert_allclose(
        result.total / 3, updates.astype(float).mean(axis=0), atol=1.01 / quantizer.scale
    )


def test_metrics_by_clients():
    quantizer = _quantizer(2, weighting="clients")
    zero = np.zeros(2, np.float32)
    total = quantizer.encode(zero, 3, 2.0, _rng()) + quantizer.encode(zero, 1, 4.0, _rng())
    result = quantizer.decode(total, 2)
    assert (result.weight, result.examples, result.loss) == (2.0, 4, 2.5)


@pytest.mark.parametrize(
    ("weighting", "metrics", "counters"),
    [("examples", True, 16), ("examples", False, 5), ("clients", True, 11), ("clients", False, 0)],
)
def test_slots(weighting, metrics, counters):
    quantizer = _quantizer(12, weighting=weighting, metrics=metrics)
    assert quantizer.slots == 12 + counters
    vector = quantizer.encode(np.ones(12, np.float32), 5, 1.0, _rng())
    assert vector.shape == (12 + counters,)
    assert vector.dtype == np.int64


def test_the_weight_is_there_without_metrics():
    quantizer = _quantizer(2, metrics=False, example_cap=1 << 20)
    zero = np.zeros(2, np.float32)
    total = sum(quantizer.encode(zero, n, None, _rng()) for n in (70_000, 1 << 30))
    result = quantizer.decode(total, 2)
    assert result.weight * (1 << 20) == 70_000 + (1 << 20)
    assert (result.examples, result.loss) == (None, None)


def test_counters_hold_large_numbers_and_stop_at_their_largest():
    quantizer = _quantizer(1, example_cap=2**40 - 1)
    zero = np.zeros(1, np.float32)
    large = quantizer.encode(zero, 2**39 + 12345, 0.0, _rng())
    assert large.max() <= 255
    assert quantizer.decode(large, 1).examples == 2**39 + 12345
    most = quantizer.encode(zero, 2**50, 1e300, _rng())
    assert most[1:].tolist() == [255] * 16
    result = quantizer.decode(most, 1)
    assert result.examples == 2**40 - 1
    assert result.loss == (2**48 - 1) / 1024 / (2**40 - 1)
    # Not even very many clients wrap a counter in the smallest ring for the update.
    assert 1000 * int(most.max()) < 2 ** (quantizer.ring_bits(1000) - 1)


def test_a_loss_is_rounded_to_the_nearest_1024th():
    quantizer = _quantizer(1, weighting="clients")
    vector = quantizer.encode(np.zeros(1, np.float32), 3, 1.3, _rng())
    assert quantizer.decode(vector, 1).loss == 3994 / 1024 / 3  # 3.9 · 1024 = 3993.6


# ------------------------------------------------------------------------------ the ring
@pytest.mark.parametrize("clients", [1, 2, 7, 1000])
@pytest.mark.parametrize("bits", [9, 16, 24])
@pytest.mark.parametrize("variance", [None, 50.0])
def test_ring_bits_is_the_least_that_does(clients, bits, variance):
    noise = None if variance is None else SkellamNoise(variance)
    quantizer = _quantizer(5, bits=bits, weighting="clients", metrics=False, noise=noise)
    tail = 0 if noise is None else noise.tail(clients)
    values = 2 * (clients * (2 ** (bits - 1) - 1) + tail) + 1
    needed = quantizer.ring_bits(clients)
    assert 2 ** (needed - 1) < values <= 2**needed


def test_ring_bits_at_the_edge_of_a_power_of_two():
    # One client of 9 bits: 511 values, -255 to 255.
    assert _quantizer(1, bits=9).ring_bits(1) == 9
    assert _quantizer(1, bits=9).ring_bits(2) == 10
    # 2 · 2³² · (2²⁹ - 1) + 1 ≤ 2⁶²
    assert _quantizer(1, bits=30).ring_bits(1 << 32) == 62
    with pytest.raises(ConfigError, match=r"8589934592 clients with 30 bits.*no noise.*63 bits"):
        _quantizer(1, bits=30).ring_bits(1 << 33)
    noisy = _quantizer(1, weighting="clients", metrics=False, noise=SkellamNoise(100.0))
    with pytest.raises(ConfigError, match=r"16 bits each and noise variance 100"):
        noisy.ring_bits(1 << 50)


# ------------------------------------------------------------------------------ noise
def test_noise_is_added_to_every_coordinate():
    noise, n = SkellamNoise(400.0), 50_000
    quantizer = _quantizer(n, bits=16, weighting="clients", metrics=False, noise=noise)
    update = np.zeros(n, np.float32)
    vector = quantizer.encode(update, 3, 1.0, _rng()).astype(float)
    spread = Z * math.sqrt((2 * 400**2 + 400) / n)
    for half in (vector[: n // 2], vector[n // 2 :]):
        assert abs((half**2).mean() - 400) < math.sqrt(2) * spread
    result = quantizer.decode(vector.astype(np.int64), 1)
    np.testing.assert_array_equal(result.total, vector / quantizer.scale)


def test_two_encodings_with_one_rng_seed_have_different_noise():
    quantizer = _quantizer(64, weighting="clients", metrics=False, noise=SkellamNoise(100.0))
    zero = np.zeros(64, np.float32)
    one, two = (quantizer.encode(zero, 1, 0.0, _rng(5)).tolist() for _ in range(2))
    assert one != two


@pytest.mark.parametrize(("weighting", "metrics"), [("examples", False), ("clients", True)])
def test_no_exact_counters_next_to_noise(weighting, metrics):
    with pytest.raises(ConfigError, match="not differentially private"):
        _quantizer(5, weighting=weighting, metrics=metrics, noise=SkellamNoise(100.0))


# ------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 9])
def test_an_update_that_is_not_finite_is_refused(value, place):
    update = np.zeros(10, np.float32)
    update[place] = value
    with pytest.raises(TrainingError, match="1 of 10"):
        _quantizer(10).encode(update, 5, 1.0, _rng())


@pytest.mark.parametrize("loss", [math.nan, math.inf, -0.001, None])
def test_a_loss_that_is_none_is_refused(loss):
    with pytest.raises(TrainingError, match="loss"):
        _quantizer(10).encode(np.zeros(10, np.float32), 5, loss, _rng())


def test_no_examples_are_refused():
    with pytest.raises(TrainingError, match="0 examples"):
        _quantizer(10).encode(np.zeros(10, np.float32), 0, 1.0, _rng())


def test_another_size_is_refused():
    with pytest.raises(ValueError, match="11"):
        _quantizer(10).encode(np.zeros(11, np.float32), 1, 1.0, _rng())


def test_too_few_bits_are_refused_with_the_number_that_does():
    # Δ'² + Δ' + 10⁶/4 + 500 = Δ² with Δ' ≥ Δ/2: Δ = 511 fails, Δ = 1023 does.
    with pytest.raises(ConfigError, match=r"10 bits .* 1000000 values; use 11 to 30"):
        _quantizer(1_000_000, bits=10)
    assert _quantizer(1_000_000, bits=11).bound == 1023


@pytest.mark.parametrize("bits", [1, 8, 31])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ConfigError, match="use 9 to 30"):
        _quantizer(10, bits=bits)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"size": 10**19},
        {"clip": 0.0},
        {"clip": -1.0},
        {"clip": math.nan},
        {"clip": math.inf},
        {"clip": 1e-305},
        {"example_cap": 0},
        {"example_cap": 2**40},
    ],
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError):
        _quantizer(**wrong)


def _sum_of_two(quantizer):
    ones = np.ones(quantizer.size, np.float32)
    return sum(quantizer.encode(ones, n, 1.0, _rng()) for n in (20, 300))


# Slots of _quantizer(10): update 0-9, examples 10-14, capped 15-19, loss 20-25; little-endian.
@pytest.mark.parametrize(
    ("slot", "value"),
    [
        (0, 2 * 32767 + 1),
        (9, -2 * 32767 - 1),
        (9, -(2**63)),
        (10, -1),
        (14, -1),
        (19, -1),
        (25, -1),
        (10, 511),
        (20, 511),
        (16, 100),  # 25,664 capped examples at two clients of at most 1000
        (11, 0),  # fewer examples than capped examples
    ],
)
def test_a_sum_that_cannot_be_is_refused(slot, value):
    quantizer = _quantizer(10)
    total = _sum_of_two(quantizer)
    assert quantizer.decode(total, 2).examples == 320
    total[slot] = value
    with pytest.raises(MalformedMessage):
        quantizer.decode(total, 2)


def test_largest_sums_are_accepted():
    quantizer = _quantizer(10)
    total = _sum_of_two(quantizer)
    total[0], total[1], total[10], total[20] = 2 * 32767, -2 * 32767, 510, 510
    result = quantizer.decode(total, 2)
    assert result.total[0] == 2 * 32767 / quantizer.scale
    assert result.examples == 510 + 256


def test_a_sum_without_weight_is_refused():
    quantizer = _quantizer(10)
    with pytest.raises(MalformedMessage, match="0 examples"):
        quantizer.decode(np.zeros(quantizer.slots, np.int64), 1)
    with pytest.raises(MalformedMessage, match="0 clients"):
        quantizer.decode(np.zeros(quantizer.slots, np.int64), 0)
    with pytest.raises(MalformedMessage, match="shape"):
        quantizer.decode(np.zeros(quantizer.slots + 1, np.int64), 1)
    by_clients = _quantizer(10, weighting="clients")
    with pytest.raises(MalformedMessage, match="0 examples"):
        by_clients.decode(np.zeros(by_clients.slots, np.int64), 1)
