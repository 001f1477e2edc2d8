"""Noise at the cut stands where it must: on every call, on every token, and before the encoding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch.nn import functional

from fedtune.config import Split, parse_config
from fedtune.errors import ConfigError, TrainingError
from fedtune.privacy.metric import MetricPrivacy
from fedtune.train.channel import Meter, in_process_channel
from fedtune.train.cut import AcrossCut
from fedtune.train.protection import Protected, protected
from fedtune.train.remote import Float32Array

WIDTH, ANSWERS = 48, 3
SERVER = (
    "base.task=visual-question-answering",
    "adapter.kind=nano",
    "base.placement=server",
)


class Server:
    """A `RemoteBase` that keeps what it got: a linear model of the sum of an example's tokens."""

    def __init__(self) -> None:
        self.weights = np.random.default_rng(1).normal(size=(WIDTH, ANSWERS)).astype(np.float32)
        self.seen: list[Float32Array] = []

    def outputs(self, embeddings: Float32Array, lengths: NDArray[np.int64]) -> Float32Array:
        self.seen.append(embeddings.copy())
        return np.tanh(embeddings).sum(1) @ self.weights

    def differentiate(
        self, embeddings: Float32Array, lengths: NDArray[np.int64], labels: NDArray[np.int64]
    ) -> tuple[Float32Array, Float32Array]:
        self.seen.append(embeddings.copy())
        with torch.enable_grad():
            x = torch.tensor(embeddings, requires_grad=True)
            logits = torch.tanh(x).sum(1) @ torch.from_numpy(self.weights)
            losses = functional.cross_entropy(logits, torch.from_numpy(labels), reduction="none")
            (gradient,) = torch.autograd.grad(losses.sum(), x)
        return losses.detach().numpy(), gradient.numpy()

    def pull_back(
        self,
        embeddings: Float32Array,
        lengths: NDArray[np.int64],
        upstream: Callable[[Float32Array], Float32Array],
    ) -> Float32Array:
        weights = upstream(self.outputs(embeddings, lengths)) @ self.weights.T
        return weights[:, None] * (1 - np.tanh(embeddings) ** 2)


@pytest.fixture
def batch() -> tuple[Float32Array, NDArray[np.int64], NDArray[np.int64]]:
    """40 examples of up to 6 tokens, filled up with rubbish; lengths, labels."""
    rng = np.random.default_rng(7)
    embeddings = rng.normal(size=(40, 6, WIDTH)).astype(np.float32)
    return embeddings, rng.integers(1, 7, 40), rng.integers(0, ANSWERS, 40)


def _calls(remote: Protected, embeddings, lengths, labels) -> None:
    remote.outputs(embeddings, lengths)
    remote.differentiate(embeddings, lengths, labels)
    remote.pull_back(embeddings, lengths, np.ones_like)


def test_no_call_sends_an_embedding_as_it_is(batch) -> None:
    embeddings, lengths, labels = batch
    server, privacy = Server(), MetricPrivacy(2.0, 30.0)
    _calls(Protected(server, privacy), embeddings, lengths, labels)
    counted = np.arange(6) < lengths[:, None]
    tokens = embeddings[counted]
    clipped = tokens * (2.0 / np.linalg.norm(tokens, axis=1, keepdims=True))
    assert len(server.seen) == 3
    for seen in server.seen:
        assert not seen[~counted].any()
        noise = np.linalg.norm(seen[counted] - clipped, axis=1)
        assert stats.kstest(noise, "gamma", args=(WIDTH, 0, 1 / 30.0)).pvalue > 1e-9
    first, second, third = (seen[counted] for seen in server.seen)
    assert not np.isclose(first, second).all(1).any()  # drawn anew
    assert not np.isclose(second, third).all(1).any()


@pytest.mark.parametrize("labels_at", ["server", "client"])
def test_gradients_are_exact_for_the_noise_that_was_drawn(batch, labels_at) -> None:
    embeddings, lengths, labels = batch
    lengths[:] = 6
    embeddings[::2] *= 0.05  # half of them short enough as they are
    server = Server()
    behind = AcrossCut(Protected(server, MetricPrivacy(1.0, 60.0)), labels_at)
    x = torch.tensor(embeddings, requires_grad=True)
    behind.loss(x, torch.from_numpy(lengths), torch.from_numpy(labels)).backward()
    (sent,) = server.seen
    again = torch.tensor(embeddings, dtype=torch.float64, requires_grad=True)
    clipped = again * (1.0 / again.norm(dim=-1, keepdim=True)).clamp(max=1)
    noise = torch.tensor(sent).double() - clipped.detach()
    logits = torch.tanh(clipped + noise).sum(1) @ torch.from_numpy(server.weights).double()
    functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
    assert torch.allclose(x.grad.double(), again.grad, rtol=1e-4, atol=1e-7)
    assert x.grad.abs().max() > 1e-3


def test_noise_comes_before_the_encoding(batch) -> None:
    # In int8 each token has 255 steps; noise on top of them would be on none.
    embeddings, lengths, _ = batch
    server = Server()
    remote = in_process_channel(server, WIDTH, "int8", Meter())
    Protected(remote, MetricPrivacy(2.0, 30.0)).outputs(embeddings, lengths)
    token = server.seen[0][0, 0].astype(np.float64)
    steps = token / (np.abs(token).max() / 127)
    assert np.allclose(steps, np.rint(steps), atol=1e-3)


def test_an_embedding_that_is_not_finite_does_not_leave(batch) -> None:
    embeddings, lengths, labels = batch
    embeddings[3, 0, 5] = np.nan
    server = Server()
    with pytest.raises(TrainingError):
        Protected(server, MetricPrivacy(2.0, 30.0)).differentiate(embeddings, lengths, labels)
    assert not server.seen


def test_without_keys_there_is_no_step() -> None:
    server = Server()
    assert protected(server, Split()) is server
    assert isinstance(protected(server, Split(clip=2.0, eta=3.0)), Protected)


@pytest.mark.parametrize("override", ["split.clip=4.0", "split.eta=50.0"])
def test_one_key_needs_the_other(override) -> None:
    with pytest.raises(ConfigError, match="set both or neither"):
        parse_config("", "test", [*SERVER, override])


@pytest.mark.parametrize("override", ["split.clip=0.0", "split.eta=0.0", "split.eta=-1.0"])
def test_a_value_out_of_range_is_refused(override) -> None:
    with pytest.raises(ConfigError):
        parse_config("", "test", [*SERVER, "split.clip=4.0", "split.eta=50.0", override])


def test_noise_needs_a_base_model_at_the_server() -> None:
    both = ["split.clip=4.0", "split.eta=50.0"]
    assert parse_config("", "test", [*SERVER, *both]).split.eta == 50.0
    with pytest.raises(ConfigError, match=r"base\.placement = server"):
        parse_config("", "test", [*SERVER[:2], *both])


def test_noise_is_not_for_training_without_gradients() -> None:
    mezo = ["train.method=forward-only", "train.optimizer=sgd"]
    parse_config("", "test", [*SERVER, *mezo])
    with pytest.raises(ConfigError, match="two passes"):
        parse_config("", "test", [*SERVER, *mezo, "split.clip=4.0", "split.eta=50.0"])
