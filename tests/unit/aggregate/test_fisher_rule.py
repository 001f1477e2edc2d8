"""Fisher merging against the paper's formula, written out value by value."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedtune.aggregate import AdamRule, FisherRule, MomentumRule
from fedtune.config import parse_config
from fedtune.round.federation import make_rule
from fedtune.update.fisher import weigh

RNG = np.random.default_rng(21)
SIZE, CLIENTS = 50, 3
START = RNG.normal(size=SIZE).astype(np.float32)
TRAINED = (START + RNG.normal(size=(CLIENTS, SIZE))).astype(np.float32)
FISHER = np.exp(3 * RNG.normal(size=(CLIENTS, SIZE))).astype(np.float32)
FISHER[0, :10] = 0  # what a client's rows do not touch
FISHER[1, 5:20] = 0
FISHER[:, 7] = 0
FISHER[2, 49] = 1e9
EXAMPLES = [3.0, 40.0, 7.0]


def _total(trained: np.ndarray, fisher: np.ndarray, damping: float, scale: float) -> np.ndarray:
    total = np.zeros(2 * SIZE)
    for k in range(len(trained)):
        total += EXAMPLES[k] * weigh(trained[k] - START, fisher[k], damping, scale)
    return total


def _by_the_paper(damping: float) -> list[float]:
    """θ = Σ λ_k F_k θ_k / Σ λ_k F_k, of capped, normalised and damped F_k, in Python's floats."""
    opinions = []
    for k in range(CLIENTS):
        touched = [i for i in range(SIZE) if FISHER[k, i] > 0]
        mean = sum(float(FISHER[k, i]) for i in touched) / len(touched)
        capped = {i: min(float(FISHER[k, i]), 100 * mean) for i in touched}
        root = math.sqrt(sum(value * value for value in capped.values()) / len(touched))
        opinions.append({i: (1 - damping) * capped[i] / root + damping for i in touched})
    merged = []
    for i in range(SIZE):
        below = sum(EXAMPLES[k] * opinions[k].get(i, 0.0) for k in range(CLIENTS))
        above = sum(
            EXAMPLES[k] * opinions[k].get(i, 0.0) * float(TRAINED[k, i]) for k in range(CLIENTS)
        )
        merged.append(above / below if below else float(START[i]))
    return merged


@pytest.mark.parametrize("damping", [0.01, 0.1, 0.7])
@pytest.mark.parametrize("scale", [1.0, 0.037])
def test_three_clients_are_merged_as_the_paper_has_it(damping: float, scale: float) -> None:
    total = _total(TRAINED, FISHER, damping, scale)
    state, merged = FisherRule(MomentumRule(), scale).apply({}, START, total, sum(EXAMPLES))
    assert merged == pytest.approx(_by_the_paper(damping), abs=2e-6)
    assert merged.dtype == np.float32
    assert state == {}
    average = np.average(TRAINED.astype(np.float64), axis=0, weights=EXAMPLES)
    assert np.abs(merged - average).max() > 0.5


@pytest.mark.parametrize("optimizer", [MomentumRule(0.7, 0.9), AdamRule()])
def test_the_optimizer_steps_by_the_merged_update(optimizer: MomentumRule | AdamRule) -> None:
    """It is to it what the mean update is to it otherwise, over rounds."""
    rule = FisherRule(optimizer, 0.5)
    state, adapter = rule.init(SIZE), START
    expected_state, expected = optimizer.init(SIZE), START
    assert {name: value.shape for name, value in state.items()} == dict.fromkeys(state, (SIZE,))
    for number in range(3):
        fisher = np.roll(FISHER, number, axis=1)
        total = _total(TRAINED, fisher, 0.1, 0.5)
        merged = np.where(total[SIZE:], 0.5 * total[:SIZE] / np.maximum(total[SIZE:], 1e-12), 0)
        state, adapter = rule.apply(state, adapter, total, sum(EXAMPLES))
        expected_state, expected = optimizer.apply(expected_state, expected, merged * 7, 7.0)
        assert adapter == pytest.approx(expected, abs=1e-6)
    assert state.keys() == expected_state.keys()


def test_without_a_weight_there_is_no_step() -> None:
    """Negative sums of weights only come of who does not follow the protocol."""
    total = np.concatenate([np.full(SIZE, 3.0), np.linspace(-1, 1, SIZE)])
    total[SIZE + 30] = 0.0
    _, merged = FisherRule(MomentumRule()).apply({}, START, total, 1.0)
    still = total[SIZE:] <= 0
    assert still.sum() == SIZE // 2 + 1
    assert (merged[still] == START[still]).all()
    assert (merged[~still] > START[~still]).all()


def test_a_divisor_near_zero_moves_by_one_clip_at_most() -> None:
    total = _total(TRAINED, FISHER, 0.1, 1.0)
    total[SIZE + 12] = 1e-30
    rule = FisherRule(MomentumRule(), 1.0, longest=2.5)
    _, merged = rule.apply({}, np.zeros(SIZE, np.float32), total, 1.0)
    assert np.linalg.norm(merged) == pytest.approx(2.5, rel=1e-6)
    # And nothing is cut that is shorter.
    uncut = FisherRule(MomentumRule()).apply({}, START, _total(TRAINED, FISHER, 0.1, 1.0), 1.0)
    long = FisherRule(MomentumRule(), longest=100.0)
    again = long.apply({}, START, _total(TRAINED, FISHER, 0.1, 1.0), 1.0)
    assert (again[1] == uncut[1]).all()


def test_apply_leaves_its_arguments_as_they_were() -> None:
    rule = FisherRule(MomentumRule(0.5, 0.9), 0.3, longest=0.1)
    state, start, total = rule.init(SIZE), START.copy(), _total(TRAINED, FISHER, 0.1, 0.3)
    before = total.copy()
    rule.apply(state, start, total, 2.0)
    assert (state["velocity"] == 0).all()
    assert (start == START).all()
    assert (total == before).all()


@pytest.mark.parametrize("size", [SIZE, 2 * SIZE - 1, 3 * SIZE])
def test_a_sum_without_two_halves_is_an_error(size: int) -> None:
    with pytest.raises(ValueError, match="shape"):
        FisherRule(MomentumRule()).apply({}, START, np.ones(size), 1.0)


def test_the_configuration_names_it_with_the_scale_that_clients_take() -> None:
    fisher = ("aggregate.rule=fisher", "aggregate.server-momentum=0.5")
    config = parse_config("", "test", [*fisher, "update.clip=12.0", "update.bits=16"])
    assert make_rule(config, 400) == FisherRule(MomentumRule(1.0, 0.5), 12.0 / 20, 12.0)
    adam = parse_config("", "test", [*fisher, "aggregate.server-optimizer=adam"])
    assert make_rule(adam, 400) == FisherRule(AdamRule(1.0, 0.5), 1.0, None)
