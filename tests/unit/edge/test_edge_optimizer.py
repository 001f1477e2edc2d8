"""The optimizers of devices against torch's."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.edge.optimizer import AdamW, Moments, Optimizer, clip_norm, make_optimizer

SIZE = 40
Name = Literal["adamw", "sgd"]


def _gradients(steps: int) -> np.ndarray:
    return np.random.default_rng(4).normal(0, 0.3, (steps, SIZE)).astype("f4")


def _start() -> np.ndarray:
    return np.random.default_rng(5).normal(size=SIZE).astype("f4")


def _torch(name: Name, decay: float, rates: list[float], gradients: np.ndarray) -> np.ndarray:
    parameter = torch.nn.Parameter(torch.from_numpy(_start()))
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    optimizer = kinds[name]([parameter], lr=0.0, weight_decay=decay)
    for lr, gradient in zip(rates, gradients, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
    return parameter.detach().numpy()


def _ours(optimizer: Optimizer, rates: list[float], gradients: np.ndarray) -> np.ndarray:
    parameters = _start()
    for lr, gradient in zip(rates, gradients, strict=True):
        optimizer.step(parameters, gradient, lr)
    return parameters


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@given(decay=st.sampled_from([0.0, 0.01, 0.3]), steps=st.integers(1, 60), lr=st.floats(1e-4, 0.1))
def test_steps_are_those_of_torch(name: Name, decay: float, steps: int, lr: float):
    rates = [lr * (1 - step / 100) for step in range(steps)]
    gradients = _gradients(steps)
    expected = _torch(name, decay, rates, gradients)
    found = _ours(make_optimizer(name, decay, Moments.zeros(SIZE)), rates, gradients)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


def test_moments_go_on_where_they_were_left():
    gradients, rates = _gradients(20), [0.01] * 20
    whole = _ours(AdamW(Moments.zeros(SIZE), 0.1), rates, gradients)
    parameters, moments = _start(), Moments.zeros(SIZE)
    for lr, gradient in zip(rates, gradients, strict=True):
        AdamW(moments, 0.1).step(parameters, gradient, lr)  # a new optimizer, the old moments
    np.testing.assert_array_equal(parameters, whole)
    fresh = _start()
    for lr, gradient in zip(rates, gradients, strict=True):
        AdamW(Moments.zeros(SIZE), 0.1).step(fresh, gradient, lr)
    assert np.abs(fresh - whole).max() > 0.01


@pytest.mark.parametrize("largest", [0.1, 1.0, 100.0])
def test_clipping_is_that_of_torch(largest: float):
    gradient = _gradients(1)[0]
    parameter = torch.nn.Parameter(torch.zeros(SIZE))
    parameter.grad = torch.from_numpy(gradient.copy())
    torch.nn.utils.clip_grad_norm_(parameter, largest)
    np.testing.assert_allclose(clip_norm(gradient, largest), parameter.grad.numpy(), rtol=1e-6)
