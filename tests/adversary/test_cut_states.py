"""Answers are known to the server of a gray box that looks: it has what makes the scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adversary.cut_server import WatchingServer
from adversary.label_inference import label_by_readout, label_from_state
from torch import nn

from fedtune.adapter.nano import GrayBoxReadout
from fedtune.base.answering import Head
from fedtune.train.activations import ENCODINGS, Encoding
from fedtune.train.channel import Meter, in_process_channel
from fedtune.train.cut import AcrossCut

WIDTH, ANSWERS, N = 32, 13, 300


def _head() -> Head:
    return Head(torch.randn(ANSWERS, WIDTH, generator=torch.Generator().manual_seed(1)), 1.0)


def _step(readout: nn.Module, encoding: Encoding) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the server has of a batch, states and the gradient by them; and the true answers."""
    rng = np.random.default_rng(0)
    server = WatchingServer(WIDTH, WIDTH)  # its outputs are states
    channel = in_process_channel(server, WIDTH, encoding, Meter(), rungs=1)
    embeddings = torch.tensor(rng.normal(size=(N, 4, WIDTH)), dtype=torch.float32)
    labels = torch.from_numpy(rng.integers(0, ANSWERS, N))
    behind = AcrossCut(channel, "client")
    behind.loss(embeddings.requires_grad_(), torch.full((N,), 4), labels, readout).backward()
    assert not server.labels
    ((states, gradient),) = server.upstream
    return states, gradient, labels.numpy()


def _right(found: np.ndarray, labels: np.ndarray) -> float:
    return float((found == labels).mean())


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_in_the_first_round_the_output_layer_is_enough(encoding: Encoding) -> None:
    _, gradient, labels = _step(GrayBoxReadout(_head(), 8), encoding)
    assert _right(label_from_state(_head().weight.numpy(), gradient), labels) > 0.99


def test_later_it_takes_the_readout_which_the_server_has() -> None:
    """It adds the readouts up; what a site's own steps of the round change is little."""
    torch.manual_seed(3)
    readout = GrayBoxReadout(_head(), 8)
    for part in (readout.nano_output.down, readout.nano_output.up):
        nn.init.normal_(part.weight, std=0.4)  # adds about as much as there was
    states, gradient, labels = _step(readout, "float16")
    with torch.no_grad():
        scores = readout(torch.from_numpy(states)) - torch.from_numpy(states) @ _head().weight.T
    assert float(scores.norm()) > float((torch.from_numpy(states) @ _head().weight.T).norm()) / 2
    ignorant = _right(label_from_state(_head().weight.numpy(), gradient), labels)
    assert _right(label_by_readout(readout, states, gradient), labels) > 0.99
    assert 1.5 / ANSWERS < ignorant < 0.99  # less, and still more than chance
    stale = GrayBoxReadout(_head(), 8)
    stale.load_state_dict(readout.state_dict())
    with torch.no_grad():
        for parameter in stale.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape))
    assert _right(label_by_readout(stale, states, gradient), labels) > 0.9
