"""The cut between a client's half of a model and the language model behind it.

Who trains sees one protocol: a `Behind` gives scores and losses for adapted embeddings. Either
the whole model is here (`WholeModel`, placement `client`), or it is a `RemoteBase` that knows
nothing of autograd (`AcrossCut`, placement `server`): gradients come back as arrays.

What stands behind the cut gives outputs, of one kind for a whole federation: the answers' scores,
or states of which a `readout` in front of the cut makes the scores (gray-box tuning, Levy et al.
2025, arXiv 2502.00796). A readout that is trained gets its gradient in the same exchange.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedtune.base.answering import Answering
from fedtune.train.remote import Float32Array, Labels, RemoteBase, differentiate

SCORES = nn.Identity()  # the readout where the outputs are scores already


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

    def outputs(self, embeddings: Float32Array, lengths: NDArray[np.int64]) -> Float32Array:
        """See `RemoteBase.outputs`."""
        with torch.inference_mode():
            found = self._decoder.outputs(torch.from_numpy(embeddings), torch.from_numpy(lengths))
        return found.numpy()

    def activations(self, embeddings: Float32Array, lengths: NDArray[np.int64]) -> Float32Array:
        """See `RemoteBase.activations`."""
        return self.outputs(embeddings, lengths)

    def pull_back(
        self,
        embeddings: Float32Array,
        lengths: NDArray[np.int64],
        upstream: Callable[[Float32Array], Float32Array],
    ) -> Float32Array:
        """See `RemoteBase.pull_back`."""
        with torch.enable_grad():
            x = torch.tensor(embeddings, requires_grad=True)
            outputs = self._decoder.outputs(x, torch.from_numpy(lengths))
            weights = torch.from_numpy(upstream(outputs.detach().numpy()))
            (gradient,) = torch.autograd.grad(outputs, x, weights)
        return gradient.numpy()


class Behind(Protocol):
    """What is behind the cut, for training with torch.

    `readout` makes scores `[n, answers]` of the outputs `[n, size]`.
    """

    def loss(
        self, embeddings: Tensor, lengths: Tensor, labels: Tensor, readout: nn.Module = SCORES
    ) -> Tensor:
        """Mean cross-entropy of a batch, a scalar.

        It is differentiable by `embeddings` and by what is trained of `readout`.
        """

    def scores(self, embeddings: Tensor, lengths: Tensor, readout: nn.Module = SCORES) -> Tensor:
        """Logits of the answers, `[n, answers]`; no gradient."""

    def activations(self, embeddings: Tensor, lengths: Tensor, training: bool) -> Tensor:
        """States `[n, rungs · width]`; no gradient. `training` is what they are counted as."""


class WholeModel:
    """The language model is in this process: one graph from the adapters to the loss."""

    def __init__(self, decoder: Answering) -> None:
        self._decoder = decoder

    def loss(
        self, embeddings: Tensor, lengths: Tensor, labels: Tensor, readout: nn.Module = SCORES
    ) -> Tensor:
        """See `Behind.loss`."""
        return functional.cross_entropy(readout(self._decoder.outputs(embeddings, lengths)), labels)

    def scores(self, embeddings: Tensor, lengths: Tensor, readout: nn.Module = SCORES) -> Tensor:
        """See `Behind.scores`."""
        found: Tensor = readout(self._decoder.outputs(embeddings, lengths))
        return found

    def activations(self, embeddings: Tensor, lengths: Tensor, training: bool) -> Tensor:
        """See `Behind.activations`; nothing is counted."""
        with torch.inference_mode():
            return self._decoder.outputs(embeddings, lengths)


class AcrossCut:
    """The language model is a `RemoteBase`; with `labels` "client" it is not told the answers."""

    def __init__(self, remote: RemoteBase, labels: Labels = "server") -> None:
        self._remote = remote
        self._labels = labels

    def loss(
        self, embeddings: Tensor, lengths: Tensor, labels: Tensor, readout: nn.Module = SCORES
    ) -> Tensor:
        """See `Behind.loss`. A `readout` that does anything needs `labels` "client"."""
        apply: Any = _CutLoss.apply  # torch leaves it untyped
        trained = _trained(readout)
        found: Tensor = apply(
            embeddings, lengths, labels, self._remote, self._labels, readout, *trained
        )
        return found

    def differentiate(
        self, embeddings: Tensor, lengths: Tensor, labels: Tensor
    ) -> tuple[float, Tensor]:
        """The mean loss and its gradient by `embeddings`, without a graph."""
        sent, counts = _array(embeddings), lengths.cpu().numpy()
        answers = labels.cpu().numpy()
        loss, gradient = differentiate(self._remote, self._labels, sent, counts, answers)
        return loss, torch.from_numpy(gradient).to(embeddings.device) / len(gradient)

    def scores(self, embeddings: Tensor, lengths: Tensor, readout: nn.Module = SCORES) -> Tensor:
        """See `Behind.scores`."""
        outputs = self._remote.outputs(_array(embeddings), lengths.cpu().numpy())
        found: Tensor = readout(torch.from_numpy(outputs).to(embeddings.device))
        return found

    def activations(self, embeddings: Tensor, lengths: Tensor, training: bool) -> Tensor:
        """See `Behind.activations`."""
        ask = self._remote.activations if training else self._remote.outputs
        found = ask(_array(embeddings), lengths.cpu().numpy())
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
        readout: nn.Module,
        *_trained: Tensor,
    ) -> Tensor:
        sent, counts = _array(embeddings), lengths.cpu().numpy()
        if ctx.needs_input_grad[0]:
            loss, ctx.gradient, ctx.own = _differentiate(
                remote, where, sent, counts, labels, readout
            )
        else:
            scores = readout(torch.from_numpy(remote.outputs(sent, counts)))
            loss = float(functional.cross_entropy(scores, labels.cpu()))
        ctx.device = embeddings.device
        return torch.tensor(loss, device=embeddings.device)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        each = upstream / len(ctx.gradient)
        gradient = torch.from_numpy(ctx.gradient).to(ctx.device) * each
        own = [part * each for part in ctx.own]
        return gradient, None, None, None, None, None, *own


def _differentiate(
    remote: RemoteBase,
    where: Labels,
    sent: Float32Array,
    lengths: NDArray[np.int64],
    labels: Tensor,
    readout: nn.Module,
) -> tuple[float, Float32Array, list[Tensor]]:
    """The mean loss, and the gradient of the sum of losses at the cut and by what is trained.

    The latter are what `readout` has, in its order.
    """
    own: list[list[Tensor]] = []

    def judge(outputs: Float32Array) -> tuple[float, Float32Array]:
        with torch.enable_grad():
            x = torch.tensor(outputs, requires_grad=True)
            loss = functional.cross_entropy(readout(x), labels.cpu(), reduction="sum")
            gradient, *found = torch.autograd.grad(loss, [x, *_trained(readout)])
        own.append(found)
        return float(loss.detach()) / len(outputs), gradient.numpy()

    answers = labels.cpu().numpy()
    loss, gradient = differentiate(remote, where, sent, lengths, answers, judge)
    return loss, gradient, own[-1] if own else []


def _trained(readout: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in readout.parameters() if parameter.requires_grad]


def _array(embeddings: Tensor) -> Float32Array:
    return embeddings.detach().cpu().numpy()
