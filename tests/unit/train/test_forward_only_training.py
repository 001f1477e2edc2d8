"""Training without gradients, against the gradients of torch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedtune.errors import TrainingError
from fedtune.train.batches import plan_batches
from fedtune.train.directions import Directions
from fedtune.train.forward_only import ForwardOnlyTrainer, passes
from fedtune.train.trainer import LocalPlan

K = 24


@pytest.fixture(scope="module")
def small(small_federation: Callable[..., Any]) -> Any:
    """A linear model of 4 inputs and 3 classes; LoRA on one layer, the other trained whole."""
    return small_federation(sizes=(40, 40, 40))


@pytest.fixture(scope="module")
def directions(small: Any) -> Directions:
    manifest = small.attached.manifest
    start = np.random.default_rng(8).normal(0, 0.5, manifest.size).astype(np.float32)
    return Directions(manifest, start, 5, K)


def _plan(batches: list[np.ndarray], lr: float, seed: int = 2) -> LocalPlan:
    return LocalPlan(iter(batches), iter([lr] * len(batches)), seed)


def _gradient(small: Any, adapter: np.ndarray, data: Any, rows: np.ndarray) -> np.ndarray:
    """Of the mean loss of these rows, by backpropagation."""
    attached = small.attached
    attached.write(adapter)
    attached.zero_grad()
    inputs = torch.stack([data.rows[row][0] for row in rows])
    targets = torch.tensor([data.rows[row][1] for row in rows])
    functional.cross_entropy(attached.module(inputs), targets).backward()
    found: np.ndarray = attached.read_gradient().astype(np.float64)
    return found


def test_a_step_is_the_slope_along_one_direction_up_to_the_square_of_the_perturbation(
    small: Any, directions: Directions
) -> None:
    """The central difference is off by ε²/6 times a third derivative: half of ε, a quarter."""
    data, rows = small.machines[0].local.train_data, np.arange(8)
    gradient = _gradient(small, directions.start, data, rows)
    zero = np.zeros(K, np.float32)
    errors = []
    for perturbation in (0.8, 0.4, 0.2):
        trainer = ForwardOnlyTrainer(small.trainer, directions, perturbation)
        off = []
        for seed in range(K):
            found = trainer.train(zero, data, _plan([rows], 1.0, seed)).adapter
            (number,) = np.flatnonzero(found)
            along = directions.move(np.zeros_like(directions.start), int(number), 1.0)
            off.append(found[number] + gradient @ along)
        errors.append(np.linalg.norm(off))
    assert np.linalg.norm(gradient) > 0.1
    assert errors[2] < 0.05
    for larger, smaller in pairwise(errors):
        assert larger / smaller == pytest.approx(4, rel=0.15)


def test_steps_are_those_of_coordinate_descent(small: Any, directions: Directions) -> None:
    """In float64, with gradients; each step starts where the one before ended."""
    data = small.machines[0].local.train_data
    batches = list(plan_batches(data.lengths, 2 * K, 8, np.random.default_rng(1)))
    start = np.random.default_rng(2).normal(0, 0.1, K).astype(np.float32)
    trainer = ForwardOnlyTrainer(small.trainer, directions, 0.005)
    result = trainer.train(start, data, _plan(batches, 0.3))
    coordinates, numbers, losses = start.astype(np.float64), passes(K, 2), []
    z = np.array([directions.move(np.zeros_like(directions.start), k, 1.0) for k in range(K)])
    for rows in batches:
        here = (directions.start + coordinates @ z).astype(np.float32)
        losses.append(small.trainer.loss(here, data, rows))
        number = next(numbers)
        coordinates[number] -= 0.3 * _gradient(small, here, data, rows) @ z[number]
    np.testing.assert_allclose(result.adapter, coordinates, atol=2e-4)
    assert np.linalg.norm(coordinates - start) > 0.1
    assert result.loss == pytest.approx(np.mean(losses), abs=1e-4)


def test_a_plan_repeats_to_the_bit_and_leaves_what_it_was_given(
    small: Any, directions: Directions
) -> None:
    data = small.machines[0].local.train_data
    batches = list(plan_batches(data.lengths, 10, 8, np.random.default_rng(1)))
    start = np.full(K, 0.1, np.float32)
    trainer = ForwardOnlyTrainer(small.trainer, directions, 0.1)
    first, again, other = (
        trainer.train(start, data, _plan(batches, 0.5, seed)).adapter for seed in (2, 2, 3)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(start, np.full(K, 0.1, np.float32))
    # Ten steps along ten directions.
    assert np.count_nonzero(first - start) == 10


def test_all_directions_come_once_before_one_comes_again() -> None:
    numbers = passes(7, 0)
    rounds = [[next(numbers) for _ in range(7)] for _ in range(4)]
    assert all(sorted(found) == list(range(7)) for found in rounds)
    assert len({tuple(found) for found in rounds}) > 1


def test_a_loss_that_is_not_finite_is_told(small: Any, directions: Directions) -> None:
    data = small.machines[0].local.train_data
    trainer = ForwardOnlyTrainer(small.trainer, directions, 0.1)
    with pytest.raises(TrainingError, match=r"train\.lr"):
        trainer.train(np.zeros(K, np.float32), data, _plan([np.arange(8)] * 9, 1e38))


def test_evaluation_is_that_of_the_adapter_that_is_meant(
    small: Any, directions: Directions
) -> None:
    data = small.machines[0].local.train_data
    coordinates = np.random.default_rng(2).normal(size=K).astype(np.float32)
    trainer = ForwardOnlyTrainer(small.trainer, directions, 0.1)
    found = trainer.evaluate(coordinates, data)
    expected = small.trainer.evaluate(directions.expand(coordinates), data)
    assert found.loss_sum == expected.loss_sum
    rows = np.arange(len(data))
    adapter = directions.expand(coordinates)
    assert small.trainer.loss(adapter, data, rows) == pytest.approx(expected.loss, rel=1e-6)
