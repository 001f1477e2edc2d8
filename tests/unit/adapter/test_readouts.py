"""Readouts against their formulas, in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import erf, expit
from torch import Tensor, nn

from fedtune.adapter.ladder import LadderReadout, attach_ladder
from fedtune.adapter.nano import GrayBoxReadout, Nano, attach_nano
from fedtune.base.answering import Head
from fedtune.base.connector import Connector

WIDTH, ANSWERS, RANK, RUNGS, N = 16, 5, 6, 3, 4


def _head() -> Head:
    return Head(torch.randn(ANSWERS, WIDTH, generator=torch.Generator().manual_seed(2)), 1.7)


def _states(seed: int = 0) -> Tensor:
    """Of rungs that differ in size, as a decoder's layers do."""
    states = torch.randn(N, RUNGS, WIDTH, generator=torch.Generator().manual_seed(seed))
    return (states * torch.tensor([0.3, 5.0, 40.0])[:, None]).flatten(1)


def _moved(module: nn.Module) -> nn.Module:
    """With no weight where it begins."""
    torch.manual_seed(4)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize(
    ("readout", "size"),
    [(GrayBoxReadout(_head(), RANK), WIDTH), (LadderReadout(_head(), RUNGS, RANK), RUNGS * WIDTH)],
)
def test_the_first_round_is_the_base_model(readout: nn.Module, size: int) -> None:
    states = _states()[:, -size:]
    assert torch.equal(readout(states), states[:, -WIDTH:] @ _head().weight.T)


def test_the_gray_box_readout_is_a_nano_adapter_before_the_head() -> None:
    readout = _moved(GrayBoxReadout(_head(), RANK))
    states = _states()[:, -WIDTH:]
    assert readout.nano_output.scale == 1.7
    expected = (readout.nano_output(states) @ _head().weight.T).detach()
    assert float((expected - states @ _head().weight.T).abs().max()) > 1
    torch.testing.assert_close(readout(states).detach(), expected)


def test_a_ladder_computes_its_formula() -> None:
    readout = _moved(LadderReadout(_head(), RUNGS, RANK))
    part = {name: value.detach().double().numpy() for name, value in readout.named_parameters()}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ part[f"{name}.weight"].T + part[f"{name}.bias"]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        x = x - x.mean(1, keepdims=True)
        x = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5)
        return x * part[f"{name}.weight"] + part[f"{name}.bias"]

    x = _states().double().numpy().reshape(N, RUNGS, WIDTH)
    h = np.zeros((N, RANK))
    for rung in range(RUNGS):
        down = linear(f"down.{rung}", x[:, rung] / np.sqrt((x[:, rung] ** 2).mean(1))[:, None])
        mix = expit(part["gates"][rung - 1] / 0.1) if rung else 1.0
        h = mix * down + (1 - mix) * h
        hidden = linear(f"blocks.{rung}.hidden", norm(f"blocks.{rung}.norm", h))
        h = h + linear(f"blocks.{rung}.out", hidden * (1 + erf(hidden / np.sqrt(2))) / 2)
    expected = (x[:, -1] + 1.7 * linear("up", norm("norm", h))) @ _head().weight.double().numpy().T
    np.testing.assert_allclose(readout(_states()).detach().numpy(), expected, rtol=1e-4, atol=1e-3)


def test_gates_begin_half_open() -> None:
    assert torch.equal(LadderReadout(_head(), RUNGS, RANK).gates, torch.zeros(RUNGS - 1))


def test_what_travels() -> None:
    connector, table = Connector(12, WIDTH, 2), nn.Embedding(30, WIDTH)
    bottleneck = 2 * WIDTH * RANK + RANK + WIDTH
    found = attach_nano(connector, table, Nano(RANK, RANK), 0, _head())
    assert found.manifest.size == 3 * bottleneck
    assert {t.name.rpartition(".")[0] for t in found.manifest.tensors if "readout" in t.name} == {
        "readout.nano_output.down",
        "readout.nano_output.up",
    }
    # A NanoAdapter-O changes nothing in how the others begin.
    without = attach_nano(connector, table, Nano(RANK), 0)
    assert np.array_equal(found.read()[: without.manifest.size], without.read())
    block = 2 * 4 * RANK**2 + 4 * RANK + RANK + 2 * RANK
    ladder = attach_ladder(connector, table, _head(), RUNGS, RANK, 0)
    expected = RUNGS * (WIDTH * RANK + RANK + block) + RUNGS - 1 + 2 * RANK + WIDTH * RANK + WIDTH
    assert ladder.manifest.size == expected
    trainable = sum(p.numel() for p in ladder.module.parameters() if p.requires_grad)
    assert trainable == expected
