"""The cut between a client's half of a model and the language model behind it.

Who trains sees one protocol: a `Behind` gives scores and losses for adapted embeddings. Either
the whole model is here (`WholeModel`, placement `client`), or it is a `RemoteBase` that knows
nothing of autograd (`AcrossCut`, placement `server`): gradients come back as arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedtune.base.answering import Answering
from fedtune.train.remote import Float32Array, Labels, RemoteBase, differentiate


class InProcessBase:
    """A `RemoteBase` that is not remote: the server's own half, and what simulations use."""

    def __init__(self, decoder: Answering) -> None:
        self._decoder = decoder

    def differentiate(
        self, embeddings: Float32Array, lengths: NDArray[np.int64], labels: NDArray[np.int64]
    ) -> tuple[Float32Array, Float32Array]:
        """See `RemoteBase.differentiate`."""
        with torch.enable_grad():  # who asks may be in the middle of a graph of its own
            x = torch.tensor(embeddings, requires_grad=True)
            logits = self._decoder.scores(x, torch.from_numpy(lengths))
            losses = functional.cross_entropy(logits, torch.from_numpy(labels), reduction="none")
            (gradient,) = torch.autograd.grad(losses.sum(), x)
        return losses.detach().numpy(), gradient.numpy()

    def scores(self, embeddings: Float32Array, lengths: NDArray[np.int64]) -> Float32Array:
        """See `RemoteBase.scores`."""
        with torch.inference_mode():
            found = self._decoder.scores(torch.from_numpy(embeddings), torch.from_numpy(lengths))
        return found.numpy()

    def pull_back(
        self,
        embeddings: Float32Array,
        lengths: NDArray[np.int64],
        upstream: Callable[[Float32Array], Float32Array],
    ) -> Float32Array:
        """See `RemoteBase.pull_back`."""
        with torch.enable_grad():
            x = torch.tensor(embeddings, requires_grad=True)
            logits = self._decoder.scores(x, torch.from_numpy(lengths))
            weights = torch.from_numpy(upstream(logits.detach().numpy()))
            (gradient,) = torch.autograd.grad(logits, x, weights)
        return gradient.numpy()


class Behind(Protocol):
    """What is behind the cut, for training with torch."""

    def loss(self, embeddings: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of a batch, a scalar that is differentiable by `embeddings`."""

    def scores(self, embeddings: Tensor, lengths: Tensor) -> Tensor:
        """Logits of the answers, `[n, answers]`; no gradient."""


class WholeModel:
    """The language model is in this process: one graph from the adapters to the loss."""

    def __init__(self, decoder: Answering) -> None:
        self._decoder = decoder

    def loss(self, embeddings: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        """See `Behind.loss`."""
        return functional.cross_entropy(self._decoder.scores(embeddings, lengths), labels)

    def scores(self, embeddings: Tensor, lengths: Tensor) -> Tensor:
        """See `Behind.scores`."""
        return self._decoder.scores(embeddings, lengths)


class AcrossCut:
    """The language model is a `RemoteBase`; with `labels` "client" it is not told the answers."""

    def __init__(self, remote: RemoteBase, labels: Labels = "server") -> None:
        self._remote = remote
        self._labels = labels

    def loss(self, embeddings: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        """See `Behind.loss`."""
        apply: Any = _CutLoss.apply  # torch leaves it untyped
        found: Tensor = apply(embeddings, lengths, labels, self._remote, self._labels)
        return found

    def differentiate(
        self, embeddings: Tensor, lengths: Tensor, labels: Tensor
    ) -> tuple[float, Tensor]:
        """The mean loss and its gradient by `embeddings`, without a graph."""
        sent, counts = _array(embeddings), lengths.cpu().numpy()
        answers = labels.cpu().numpy()
        loss, gradient = differentiate(self._remote, self._labels, sent, counts, answers)
        return loss, torch.from_numpy(gradient).to(embeddings.device) / len(gradient)

    def scores(self, embeddings: Tensor, lengths: Tensor) -> Tensor:
        """See `Behind.scores`."""
        found = self._remote.scores(_array(embeddings), lengths.cpu().numpy())
        return torch.from_numpy(found).to(embeddings.device)


class _CutLoss(torch.autograd.Function):
    """The mean loss, whose gradient by the embeddings the other side has computed with it."""

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        lengths: Tensor,
        labels: Tensor,
        remote: RemoteBase,
        where: Labels,
    ) -> Tensor:
        sent, counts = _array(embeddings), lengths.cpu().numpy()
        if ctx.needs_input_grad[0]:
            answers = labels.cpu().numpy()
            loss, ctx.gradient = differentiate(remote, where, sent, counts, answers)
        else:
            logits = torch.from_numpy(remote.scores(sent, counts))
            loss = float(functional.cross_entropy(logits, labels.cpu()))
        ctx.device = embeddings.device
        return torch.tensor(loss, device=embeddings.device)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient = torch.from_numpy(ctx.gradient).to(ctx.device) * (upstream / len(ctx.gradient))
        return gradient, None, None, None, None


def _array(embeddings: Tensor) -> Float32Array:
    return embeddings.detach().cpu().numpy()
