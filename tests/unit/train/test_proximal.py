"""The proximal term against FedProx's own step, put together of single steps without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from fedtune.config import parse_config
from fedtune.errors import ConfigError
from fedtune.train.task import CustomTask
from fedtune.train.torch_trainer import TorchSettings, TorchTrainer
from fedtune.train.trainer import LocalPlan

RATE, PULL = 0.2, 0.7
BATCHES = [np.array([0, 3, 5]), np.array([1, 2, 4]), np.array([6, 7, 8])]


@pytest.fixture(scope="module")
def small(small_federation: Callable[..., Any]) -> Any:
    return small_federation(sizes=(12,))


def _train(
    small: Any, start: np.ndarray, batches: Sequence[np.ndarray], proximal: float, **settings: Any
) -> np.ndarray:
    trainer = TorchTrainer(
        small.attached, CustomTask(), "ab" * 32, TorchSettings("sgd", **settings)
    )
    plan = LocalPlan(iter(batches), iter([RATE] * len(batches)), 0, 3, proximal=proximal)
    rows = small.machines[0]._local.train_data
    return trainer.train(start, rows, plan).adapter


def test_each_step_is_pulled_back_to_where_the_round_began(small: Any) -> None:
    start = np.random.default_rng(2).normal(size=small.attached.manifest.size) / 2
    start = start.astype(np.float32)
    expected = start
    for batch in BATCHES:
        alone = _train(small, expected, [batch], 0.0)
        expected = alone - RATE * PULL * (expected - start)
    found = _train(small, start, BATCHES, PULL)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    free = _train(small, start, BATCHES, 0.0)
    assert np.linalg.norm(found - start) < 0.95 * np.linalg.norm(free - start)


def test_the_pull_is_clipped_with_the_gradient(small: Any) -> None:
    start = np.zeros(small.attached.manifest.size, np.float32) + np.float32(0.1)
    for proximal in (0.0, 1e6):
        found = _train(small, start, BATCHES, proximal, max_grad_norm=0.05)
        assert np.linalg.norm(found - start) <= len(BATCHES) * RATE * 0.05 * 1.001


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.method=forward-only", "train.optimizer=sgd"],
        ["privacy.unit=record", "privacy.epsilon=3"],
    ],
)
def test_where_it_is_not_it_is_refused(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"train\.proximal"):
        parse_config("", "test", ["train.proximal=0.1", *overrides])
