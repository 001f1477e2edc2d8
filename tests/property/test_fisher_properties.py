"""What Fisher merging is whatever the numbers are."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedtune.aggregate import FisherRule, MomentumRule
from fedtune.update.fisher import weigh, weights
from fedtune.update.quantize import Quantizer

SEEDS = st.integers(0, 2**32)
SIZES = st.integers(1, 80)
DAMPINGS = st.floats(1e-3, 1)
SPREADS = st.floats(0, 6)
SCALES = st.sampled_from([1.0, 0.01, 30.0])


def _updates(rng: np.random.Generator, clients: int, size: int) -> np.ndarray:
    return rng.normal(size=(clients, size)).astype(np.float32)


def _fisher(rng: np.random.Generator, size: int, spread: float) -> np.ndarray:
    """Positive, over e^±`spread` or so."""
    return np.exp(spread * rng.normal(size=size)).astype(np.float32)


def _merge(
    vectors: list[np.ndarray], scale: float, examples: np.ndarray | None = None
) -> np.ndarray:
    counts = np.ones(len(vectors)) if examples is None else examples
    total = np.einsum("k,ki->i", counts, np.array(vectors, np.float64))
    start = np.zeros(len(total) // 2, np.float32)
    return FisherRule(MomentumRule(), scale).apply({}, start, total, counts.sum())[1]


@given(SEEDS, SIZES, DAMPINGS, SPREADS, SCALES)
def test_one_client_is_merged_to_what_it_trained(
    seed: int, size: int, damping: float, spread: float, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    [update] = _updates(rng, 1, size)
    found = _merge([weigh(update, _fisher(rng, size, spread), damping, scale)], scale)
    np.testing.assert_allclose(found, update, rtol=1e-6)


@given(SEEDS, SIZES, st.integers(1, 9), DAMPINGS, SPREADS, SCALES)
def test_of_one_mind_about_what_matters_it_is_plain_averaging(
    seed: int, size: int, clients: int, damping: float, spread: float, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    updates, examples = _updates(rng, clients, size), rng.integers(1, 1000, clients)
    fisher = _fisher(rng, size, spread)
    # Gradients of another size, as of a higher loss, change nothing.
    sizes = np.exp(5 * rng.normal(size=clients)).astype(np.float32)
    vectors = [weigh(u, s * fisher, damping, scale) for u, s in zip(updates, sizes, strict=True)]
    expected = np.average(updates.astype(np.float64), axis=0, weights=examples)
    np.testing.assert_allclose(_merge(vectors, scale, examples), expected, atol=2e-5)


@given(SEEDS, SIZES, st.integers(1, 9), SPREADS)
def test_damped_to_the_end_it_is_plain_averaging(
    seed: int, size: int, clients: int, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    updates = _updates(rng, clients, size)
    vectors = [weigh(update, _fisher(rng, size, spread), 1.0, 1.0) for update in updates]
    np.testing.assert_allclose(_merge(vectors, 1.0), updates.mean(0), atol=1e-5)


@given(SEEDS, SIZES, st.integers(1, 9), DAMPINGS, SPREADS)
def test_what_is_merged_lies_among_what_clients_trained(
    seed: int, size: int, clients: int, damping: float, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    updates = _updates(rng, clients, size)
    vectors = [weigh(update, _fisher(rng, size, spread), damping, 1.0) for update in updates]
    found = _merge(vectors, 1.0)
    assert (found >= updates.min(0) - 1e-5).all()
    assert (found <= updates.max(0) + 1e-5).all()


@given(SEEDS, st.integers(2, 80), DAMPINGS, SPREADS)
def test_who_did_not_touch_a_value_has_no_say_in_it(
    seed: int, size: int, damping: float, spread: float
) -> None:
    """One site with images and many without: their zeros do not hold it back."""
    rng = np.random.default_rng(seed)
    images = np.arange(size) >= rng.integers(1, size)
    with_images = _updates(rng, 1, size)[0]
    vectors = [weigh(with_images, _fisher(rng, size, spread), damping, 1.0)]
    for _ in range(5):
        update = np.where(images, 0, _updates(rng, 1, size)[0]).astype(np.float32)
        fisher = np.where(images, 0, _fisher(rng, size, spread)).astype(np.float32)
        vectors.append(weigh(update, fisher, damping, 1.0))
    found = _merge(vectors, 1.0)
    np.testing.assert_allclose(found[images], with_images[images], rtol=1e-6)
    # And a client whose training failed sends zeros, which say nothing either.
    again = _merge([*vectors, np.zeros(2 * size, np.float32)], 1.0)
    assert (again == found).all()


@given(SEEDS, st.integers(1, 300), DAMPINGS, st.floats(0, 15))
def test_weights_are_of_mean_square_1_at_most(
    seed: int, size: int, damping: float, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    fisher = np.where(rng.random(size) < 0.2, 0, _fisher(rng, size, spread)).astype(np.float32)
    found = weights(fisher, damping)
    assert (found[fisher > 0] >= damping).all()
    assert (found[fisher == 0] == 0).all()
    assert np.mean(found**2) <= 1 + 1e-9


@given(SEEDS, st.integers(1, 300), DAMPINGS, st.floats(0.01, 1))
def test_a_client_that_is_clipped_is_merged_to_the_same(
    seed: int, size: int, damping: float, clip: float
) -> None:
    """Both halves get shorter together; what is left is the rounding."""
    rng = np.random.default_rng(seed)
    [update] = _updates(rng, 1, size)
    scale = clip / np.sqrt(size)
    vector = weigh(update, _fisher(rng, size, 1.0), damping, scale)
    quantizer = Quantizer(2 * size, clip, 30, "clients", 1, False, None)
    assert np.linalg.norm(vector) > np.linalg.norm(update) * damping / 2
    integers = quantizer.encode(vector, 1, None, rng)
    found = _merge([quantizer.decode(integers, 1).total], scale)
    assert np.linalg.norm(found - update) < 1e-3 * np.linalg.norm(update)
