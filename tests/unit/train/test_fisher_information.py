"""The trainer's Fisher information against torch's autograd on a model written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedtune.train.private import RecordPrivacy
from fedtune.train.task import CustomTask
from fedtune.train.torch_trainer import TorchSettings, TorchTrainer
from fedtune.train.trainer import LocalPlan

BATCHES = [np.array([0, 3, 5, 6]), np.array([1, 2]), np.array([4]), np.array([7, 8, 9, 10, 11])]
RATES = [0.3, 0.1, 0.2, 0.0]


@pytest.fixture(scope="module")
def small(small_federation: Callable[..., Any]) -> Any:
    return small_federation(sizes=(12,))


@pytest.fixture(scope="module")
def start(small: Any) -> np.ndarray:
    """No value is zero, so that all get a gradient."""
    rng = np.random.default_rng(2)
    return rng.normal(size=small.attached.manifest.size).astype(np.float32) / 2


def _trainer(small: Any, **settings: Any) -> TorchTrainer:
    return TorchTrainer(small.attached, CustomTask(), "ab" * 32, TorchSettings("sgd", **settings))


def _plan(fisher: bool = True, batches: list[np.ndarray] = BATCHES) -> LocalPlan:
    return LocalPlan(iter(batches), iter(RATES[: len(batches)]), 0, 4, fisher)


def _by_hand(small: Any, start: np.ndarray, clip: float | None) -> np.ndarray:
    """SGD on head(inner(x) + 2·B·A·x), tensor by tensor, in float64."""
    frozen = small.attached.module.get_submodule("base_model.model.inner.base_layer")
    weight, bias = frozen.weight.detach().double(), frozen.bias.detach().double()
    manifest = small.attached.manifest
    values = {
        name.split(".", 2)[2]: torch.from_numpy(value.copy()).double().requires_grad_()
        for name, value in manifest.split(start).items()
    }
    rows = small.machines[0]._local.train_data
    inputs = torch.stack([row[0] for row in rows.rows]).double()
    labels = torch.tensor([row[1] for row in rows.rows])
    squares = [torch.zeros_like(value) for value in values.values()]
    for batch, rate in zip(BATCHES, RATES, strict=True):
        x = inputs[batch]
        hidden = x @ weight.T + bias
        hidden = hidden + 2 * x @ values["inner.lora_A.weight"].T @ values["inner.lora_B.weight"].T
        logits = hidden @ values["head.weight"].T + values["head.bias"]
        loss = functional.cross_entropy(logits, labels[batch])
        gradients = torch.autograd.grad(loss, list(values.values()))
        norm = torch.sqrt(sum((g**2).sum() for g in gradients))
        shorter = 1.0 if clip is None else min(1.0, clip / float(norm))
        with torch.no_grad():
            for value, square, g in zip(values.values(), squares, gradients, strict=True):
                square.add_(len(batch) * g**2 / len(BATCHES))
                value.sub_(rate * shorter * g)
    return np.concatenate([square.numpy().ravel() for square in squares])


@pytest.mark.parametrize("clip", [None, 0.2])
def test_it_is_the_mean_of_squared_gradients_by_batch_size(
    small: Any, start: np.ndarray, clip: float | None
) -> None:
    """Gradients as they are before they are clipped, along the way that training goes."""
    expected = _by_hand(small, start, clip)
    data = small.machines[0]._local.train_data
    result = _trainer(small, max_grad_norm=clip).train(start, data, _plan())
    assert result.fisher is not None
    assert result.fisher.dtype == np.float32
    assert result.fisher == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert expected.min() > 0
    if clip is not None:  # the clip is felt, though only by the way that is gone
        assert result.fisher != pytest.approx(_by_hand(small, start, None), rel=0.05)


def test_of_batches_of_one_it_is_the_empirical_fisher_information(
    small: Any, start: np.ndarray
) -> None:
    """At one adapter: the mean over the examples of their squared gradients."""
    data = small.machines[0]._local.train_data
    trainer = _trainer(small)
    squares = []
    for row in range(4):
        stepped = trainer.train(start, data, LocalPlan(iter([np.array([row])]), iter([1.0]), 0))
        squares.append((start - stepped.adapter).astype(np.float64) ** 2)  # SGD steps by it
    plan = LocalPlan(iter([np.array([row]) for row in range(4)]), iter([0.0] * 4), 0, 1, True)
    result = trainer.train(start, data, plan)
    assert result.fisher == pytest.approx(np.mean(squares, axis=0), rel=1e-3, abs=1e-8)


def test_it_comes_only_when_asked_for_and_changes_nothing(small: Any, start: np.ndarray) -> None:
    data = small.machines[0]._local.train_data
    trainer = _trainer(small)
    without, asked = trainer.train(start, data, _plan(False)), trainer.train(start, data, _plan())
    assert without.fisher is None
    assert (without.adapter == asked.adapter).all()
    assert without.loss == asked.loss


def test_with_record_level_privacy_there_is_none(small: Any, start: np.ndarray) -> None:
    trainer = _trainer(small, record_privacy=RecordPrivacy(1.0, 1.0))
    data = small.machines[0]._local.train_data
    with pytest.raises(ValueError, match="no noise"):
        trainer.train(start, data, _plan())
