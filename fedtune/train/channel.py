"""What passes the cut, as bytes: a `RemoteBase` behind an encoding, and what that cost."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedtune.train.activations import Encoding, decode, encode
from fedtune.train.cut import Float32Array, RemoteBase


@dataclass(frozen=True)
class CutTraffic:
    """Bytes of embeddings, gradients and scores that passed the cut, and for how many examples.

    `tokens` is how many the trained examples had: with 2 × tokens × width × bytes, the least that
    could pass. Frames and headers are not in it.
    """

    trained: int = 0
    tokens: int = 0
    up: int = 0
    down: int = 0
    evaluated: int = 0
    evaluation_bytes: int = 0


class Meter:
    """Counts `CutTraffic`, also over the processes that are forked after it was made."""

    def __init__(self) -> None:
        self._counts = multiprocessing.get_context("fork").Array("q", 6)

    def add(self, traffic: CutTraffic) -> None:
        """Count this too."""
        with self._counts.get_lock():
            for place, value in enumerate(vars(traffic).values()):
                self._counts[place] += value

    @property
    def traffic(self) -> CutTraffic:
        """All that was counted."""
        with self._counts.get_lock():
            return CutTraffic(*self._counts[:])


class Channel:
    """A `RemoteBase` that gets and gives what is left of the values after their encoding."""

    def __init__(self, remote: RemoteBase, encoding: Encoding, meter: Meter) -> None:
        self._remote = remote
        self._encoding = encoding
        self._meter = meter

    def differentiate(
        self, embeddings: Float32Array, lengths: NDArray[np.int64], labels: NDArray[np.int64]
    ) -> tuple[Float32Array, Float32Array]:
        """See `RemoteBase.differentiate`."""
        sent, up = self._passed(embeddings, lengths)
        losses, gradient = self._remote.differentiate(sent, lengths, labels)
        found, down = self._passed(gradient, lengths)
        self._count(lengths, up + labels.nbytes, down + losses.nbytes)
        return losses, found

    def scores(self, embeddings: Float32Array, lengths: NDArray[np.int64]) -> Float32Array:
        """See `RemoteBase.scores`."""
        sent, up = self._passed(embeddings, lengths)
        found = self._remote.scores(sent, lengths)
        self._meter.add(CutTraffic(evaluated=len(lengths), evaluation_bytes=up + found.nbytes))
        return found

    def pull_back(
        self,
        embeddings: Float32Array,
        lengths: NDArray[np.int64],
        upstream: Callable[[Float32Array], Float32Array],
    ) -> Float32Array:
        """See `RemoteBase.pull_back`."""
        sent, up = self._passed(embeddings, lengths)
        scores: list[int] = []

        def counted(logits: Float32Array) -> Float32Array:
            scores.append(logits.nbytes)
            return upstream(logits)

        gradient = self._remote.pull_back(sent, lengths, counted)
        found, down = self._passed(gradient, lengths)
        self._count(lengths, up + sum(scores), down + sum(scores))
        return found

    def _passed(self, tokens: Float32Array, lengths: NDArray[np.int64]) -> tuple[Float32Array, int]:
        """Tokens that count, there and back through the encoding; and how many bytes that is."""
        counted = np.arange(tokens.shape[1]) < lengths[:, None]
        data = encode(tokens[counted], self._encoding)
        found = np.zeros_like(tokens)
        found[counted] = decode(data, int(counted.sum()), tokens.shape[2], self._encoding)
        return found, len(data)

    def _count(self, lengths: NDArray[np.int64], up: int, down: int) -> None:
        self._meter.add(CutTraffic(len(lengths), int(lengths.sum()), up, down))
