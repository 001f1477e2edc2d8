"""What passes the cut, as bytes: a `RemoteBase` behind an encoding, and what that cost.

A `Channel` encodes, decodes and counts; a `Carrier` brings encoded tokens to the base model and
back: within a process here, over a network in `fedtune.split`.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import MalformedMessage, TrainingError
from fedtune.train.activations import Encoding, decode, encode
from fedtune.train.remote import Float32Array, RemoteBase

LABEL_BYTES = 4  # of one on the wire
Int64Array = NDArray[np.int64]


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

    def __add__(self, other: CutTraffic) -> CutTraffic:
        """Both together."""
        return CutTraffic(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Metered(Protocol):
    """Something that knows what passed."""

    @property
    def traffic(self) -> CutTraffic:
        """All that was counted."""


class Meter:
    """Counts `CutTraffic`, also over the processes that are forked after it was made."""

    def __init__(self) -> None:
        self._counts = multiprocessing.get_context("fork").Array("q", 6)

    def add(self, traffic: CutTraffic) -> None:
        """Count this too."""
        with self._counts.get_lock():
            for place, value in enumerate(astuple(traffic)):
                self._counts[place] += value

    @property
    def traffic(self) -> CutTraffic:
        """All that was counted."""
        with self._counts.get_lock():
            return CutTraffic(*self._counts[:])


class Carrier(Protocol):
    """Brings encoded tokens to a base model, and its answers back; as `RemoteBase`, in bytes.

    `tokens` are those that count, one example's after another's; so are gradients.
    """

    def differentiate(
        self, tokens: bytes, lengths: Int64Array, labels: Int64Array
    ) -> tuple[Float32Array, bytes]:
        """See `RemoteBase.differentiate`."""

    def scores(self, tokens: bytes, lengths: Int64Array) -> Float32Array:
        """See `RemoteBase.scores`."""

    def pull_back(
        self, tokens: bytes, lengths: Int64Array, upstream: Callable[[Float32Array], Float32Array]
    ) -> tuple[Float32Array, bytes]:
        """The logits, and the gradient by the tokens: see `RemoteBase.pull_back`."""


class Channel:
    """A `RemoteBase` that gets and gives what is left of the values after their encoding.

    What was carried in vain, because the other side had to be asked again, is not counted.
    """

    def __init__(self, carrier: Carrier, encoding: Encoding, meter: Meter) -> None:
        self._carrier = carrier
        self._encoding = encoding
        self._meter = meter

    def differentiate(
        self, embeddings: Float32Array, lengths: Int64Array, labels: Int64Array
    ) -> tuple[Float32Array, Float32Array]:
        """See `RemoteBase.differentiate`."""
        sent = pack(embeddings, lengths, self._encoding)
        losses, gradient = self._carrier.differentiate(sent, lengths, labels)
        found = self._unpacked(gradient, lengths, embeddings.shape)
        up = len(sent) + LABEL_BYTES * len(labels)
        self._count(lengths, up, len(gradient) + losses.nbytes)
        return losses, found

    def scores(self, embeddings: Float32Array, lengths: Int64Array) -> Float32Array:
        """See `RemoteBase.scores`."""
        sent = pack(embeddings, lengths, self._encoding)
        found = self._carrier.scores(sent, lengths)
        passed = len(sent) + found.nbytes
        self._meter.add(CutTraffic(evaluated=len(lengths), evaluation_bytes=passed))
        return found

    def pull_back(
        self,
        embeddings: Float32Array,
        lengths: Int64Array,
        upstream: Callable[[Float32Array], Float32Array],
    ) -> Float32Array:
        """See `RemoteBase.pull_back`."""
        sent = pack(embeddings, lengths, self._encoding)
        logits, gradient = self._carrier.pull_back(sent, lengths, upstream)
        found = self._unpacked(gradient, lengths, embeddings.shape)
        self._count(lengths, len(sent) + logits.nbytes, len(gradient) + logits.nbytes)
        return found

    def _unpacked(
        self, gradient: bytes, lengths: Int64Array, shape: tuple[int, ...]
    ) -> Float32Array:
        try:
            return unpack(gradient, lengths, shape[1:], self._encoding)
        except MalformedMessage as error:
            raise TrainingError(f"the base model's gradient is not one: {error}") from error

    def _count(self, lengths: Int64Array, up: int, down: int) -> None:
        self._meter.add(CutTraffic(len(lengths), int(lengths.sum()), up, down))


class InProcessCarrier:
    """Carries to a base model in this process: the same arithmetic as over a network."""

    def __init__(self, remote: RemoteBase, width: int, encoding: Encoding) -> None:
        """`width` is that of the base model's embeddings."""
        self._remote, self._width, self._encoding = remote, width, encoding

    def differentiate(
        self, tokens: bytes, lengths: Int64Array, labels: Int64Array
    ) -> tuple[Float32Array, bytes]:
        """See `Carrier.differentiate`."""
        losses, gradient = self._remote.differentiate(self._there(tokens, lengths), lengths, labels)
        return losses, pack(gradient, lengths, self._encoding)

    def scores(self, tokens: bytes, lengths: Int64Array) -> Float32Array:
        """See `Carrier.scores`."""
        return self._remote.scores(self._there(tokens, lengths), lengths)

    def pull_back(
        self, tokens: bytes, lengths: Int64Array, upstream: Callable[[Float32Array], Float32Array]
    ) -> tuple[Float32Array, bytes]:
        """See `Carrier.pull_back`."""
        seen: list[Float32Array] = []

        def watched(logits: Float32Array) -> Float32Array:
            seen.append(logits)
            return upstream(logits)

        gradient = self._remote.pull_back(self._there(tokens, lengths), lengths, watched)
        return seen[-1], pack(gradient, lengths, self._encoding)

    def _there(self, tokens: bytes, lengths: Int64Array) -> Float32Array:
        return unpack(tokens, lengths, (int(lengths.max()), self._width), self._encoding)


def pack(values: Float32Array, lengths: Int64Array, encoding: Encoding) -> bytes:
    """The tokens of `[n, longest, width]` that count, encoded; `TrainingError` if not finite."""
    found = values[_counting(values.shape[1], lengths)]
    if not np.isfinite(found).all():
        raise TrainingError(
            "an embedding or its gradient is not finite: training has diverged; lower train.lr"
        )
    return encode(found, encoding)


def unpack(
    data: bytes, lengths: Int64Array, shape: tuple[int, ...], encoding: Encoding
) -> Float32Array:
    """Decoded tokens, float32 `[n, *shape]` with shape `(longest, width)`, zero where none counts.

    Raises `MalformedMessage`.
    """
    longest, width = shape
    tokens = decode(data, int(lengths.sum()), width, encoding)
    found = np.zeros((len(lengths), longest, width), np.float32)
    found[_counting(longest, lengths)] = tokens
    return found


def _counting(longest: int, lengths: Int64Array) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = np.arange(longest) < lengths[:, None]
    return found


def in_process_channel(remote: RemoteBase, width: int, encoding: Encoding, meter: Meter) -> Channel:
    """A channel to a base model in this process, whose embeddings have `width` values."""
    return Channel(InProcessCarrier(remote, width, encoding), encoding, meter)
