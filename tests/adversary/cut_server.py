"""The server's end of the cut, as an attacker who follows the protocol and keeps what passes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedtune.train.remote import Float32Array


class WatchingServer:
    """A `RemoteBase` with a linear model in the place of the decoder; `seen` is what it got."""

    def __init__(self, width: int, answers: int) -> None:
        self.width = width
        self._head = np.random.default_rng(3).normal(size=(width, answers)).astype(np.float32)
        self.seen: list[list[Float32Array]] = []  # of each call, the tokens of each example
        self.upstream: list[tuple[Float32Array, Float32Array]] = []  # scores, their gradient
        self.labels: list[NDArray[np.int64]] = []

    def outputs(self, embeddings: Float32Array, lengths: NDArray[np.int64]) -> Float32Array:
        """See `RemoteBase.outputs`."""
        self.seen.append(
            [row[:length].copy() for row, length in zip(embeddings, lengths, strict=True)]
        )
        return embeddings.mean(1) @ self._head

    def activations(self, embeddings: Float32Array, lengths: NDArray[np.int64]) -> Float32Array:
        """See `RemoteBase.activations`."""
        return self.outputs(embeddings, lengths)

    def differentiate(
        self, embeddings: Float32Array, lengths: NDArray[np.int64], labels: NDArray[np.int64]
    ) -> tuple[Float32Array, Float32Array]:
        """See `RemoteBase.differentiate`; the gradient is of no matter here."""
        self.outputs(embeddings, lengths)
        self.labels.append(labels.copy())
        return np.zeros(len(lengths), np.float32), np.zeros_like(embeddings)

    def pull_back(
        self,
        embeddings: Float32Array,
        lengths: NDArray[np.int64],
        upstream: Callable[[Float32Array], Float32Array],
    ) -> Float32Array:
        """See `RemoteBase.pull_back`."""
        scores = self.outputs(embeddings, lengths)
        self.upstream.append((scores, upstream(scores)))
        return np.zeros_like(embeddings)
