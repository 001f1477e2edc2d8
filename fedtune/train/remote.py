"""A base model that is somewhere else, as arrays. Knows no torch: edge devices ask one too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtune.train.cross_entropy import cross_entropy, cross_entropy_slope

Float32Array = NDArray[np.float32]
Labels = Literal["server", "client"]
# Outputs of a base model → their mean loss, and the gradient of the sum of losses by them.
Judge = Callable[[Float32Array], tuple[float, Float32Array]]


class RemoteBase(Protocol):
    """A frozen language model that is somewhere else, as arrays.

    `embeddings` are float32 `[n, longest, width]`, filled up on the right; `lengths` int64 `[n]`;
    `labels` int64 `[n]`, places in the list of answers. Raises `TrainingError` where the other
    side does not answer or refuses.
    """

    def differentiate(
        self, embeddings: Float32Array, lengths: NDArray[np.int64], labels: NDArray[np.int64]
    ) -> tuple[Float32Array, Float32Array]:
        """Each example's cross-entropy `[n]`, and its gradient by the example's embeddings.

        The gradient has the shape of `embeddings`, zero where they do not count. Only where the
        outputs are scores.
        """

    def outputs(self, embeddings: Float32Array, lengths: NDArray[np.int64]) -> Float32Array:
        """Logits of the answers `[n, answers]`, or states `[n, rungs · width]`, to evaluate."""

    def activations(self, embeddings: Float32Array, lengths: NDArray[np.int64]) -> Float32Array:
        """States `[n, rungs · width]`, to train what stands beside the language model.

        No gradient follows. Only where the outputs are states.
        """

    def pull_back(
        self,
        embeddings: Float32Array,
        lengths: NDArray[np.int64],
        upstream: Callable[[Float32Array], Float32Array],
    ) -> Float32Array:
        """The gradient by `embeddings` of what `upstream` says of the outputs.

        `upstream` takes the outputs and gives the loss's gradient by them, both `[n, size]`: the
        answers stay with who asks. Where the other side has to be asked again it is called again.
        """


def differentiate(
    remote: RemoteBase,
    where: Labels,
    sent: Float32Array,
    lengths: NDArray[np.int64],
    labels: NDArray[np.int64],
    judge: Judge | None = None,
) -> tuple[float, Float32Array]:
    """The mean loss, and the gradient of the sum of losses at the cut; `where` the labels stay.

    `judge` says how good outputs are; by default they are scores, and it is cross-entropy.
    """
    if where == "server":
        losses, gradient = remote.differentiate(sent, lengths, labels)
        return float(losses.mean()), gradient
    found: list[float] = []

    def upstream(outputs: Float32Array) -> Float32Array:
        loss, slope = judge(outputs) if judge else _cross_entropy(outputs, labels)
        found.append(loss)
        return slope

    gradient = remote.pull_back(sent, lengths, upstream)
    # Of several tries the last one counts.
    return found[-1], gradient


def _cross_entropy(scores: Float32Array, labels: NDArray[np.int64]) -> tuple[float, Float32Array]:
    logits = scores.astype(np.float64)
    slope = cross_entropy_slope(logits, labels).astype(np.float32)
    return float(cross_entropy(logits, labels).mean()), slope
