"""Answers are known to a server that looks, wherever they are kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adversary.cut_server import WatchingServer
from adversary.label_inference import likeliest_label, negative_entry, softmax

from fedtune.config import Split
from fedtune.train.activations import ENCODINGS
from fedtune.train.channel import Meter, in_process_channel
from fedtune.train.cut import AcrossCut
from fedtune.train.protection import protected
from fedtune.train.remote import Labels

WIDTH, ANSWERS, N = 32, 13, 200


def _train(labels_at: Labels, split: Split) -> tuple[WatchingServer, np.ndarray]:
    """One step through the cut; the server, and the true answers."""
    rng = np.random.default_rng(0)
    server = WatchingServer(WIDTH, ANSWERS)
    remote = protected(in_process_channel(server, server.width, split.activations, Meter()), split)
    embeddings = torch.tensor(rng.normal(size=(N, 4, WIDTH)), dtype=torch.float32)
    labels = torch.from_numpy(rng.integers(0, ANSWERS, N))
    behind = AcrossCut(remote, labels_at)
    behind.loss(embeddings.requires_grad_(), torch.full((N,), 4), labels).backward()
    return server, labels.numpy()


def test_with_answers_at_the_server_they_are_sent() -> None:
    server, labels = _train("server", Split())
    assert (server.labels[0] == labels).all()


@pytest.mark.parametrize("noise", [{}, {"clip": 4.0, "eta": 50.0}])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_with_answers_at_the_client_the_gradient_says_them(encoding, noise) -> None:
    # Noise on embeddings makes no difference: the gradient is by the scores, which the server has.
    server, labels = _train("client", Split(activations=encoding, **noise))
    assert not server.labels
    ((scores, gradient),) = server.upstream
    assert (negative_entry(gradient) == labels).all()
    assert ((gradient < 0).sum(1) == 1).all()
    assert np.allclose(softmax(scores) - gradient, np.eye(ANSWERS)[labels], atol=1e-5)


def test_clipping_that_gradient_hides_nothing() -> None:
    server, labels = _train("client", Split())
    ((_, gradient),) = server.upstream
    clipped = gradient * np.minimum(0.01 / np.linalg.norm(gradient, axis=1, keepdims=True), 1)
    assert (negative_entry(clipped) == labels).all()


def test_noise_on_that_gradient_is_averaged_out_over_the_passes() -> None:
    # The server takes its own softmax away; what is left is the one-hot answer and the noise, and
    # of the answer it gets another look in each pass.
    server, labels = _train("client", Split())
    ((scores, gradient),) = server.upstream
    rng = np.random.default_rng(1)
    noisy = gradient + rng.laplace(scale=2.0, size=(100, *gradient.shape))
    once, often = (likeliest_label(scores, part) for part in (noisy[0], noisy.mean(0)))
    assert (once == labels).mean() < 0.4  # Laplace of scale 2: an epsilon of 1 for one look
    assert (often == labels).mean() > 0.7
