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
from fedtune.train.activations import Encoding, OutputCoding, decode, encode
from fedtune.train.remote import Float32Array, RemoteBase

LABEL_BYTES = 4  # of one on the wire
Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class CutTraffic:
    """Bytes of embeddings, gradients and outputs that passed the cut, and for how many examples.

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

    `tokens` are those that count, one example's after another's; so are gradients. Outputs and
    gradients by them are as `OutputCoding` has them.
    """

    def differentiate(
        self, tokens: bytes, lengths: Int64Array, labels: Int64Array
    ) -> tuple[Float32Array, bytes]:
        """See `RemoteBase.differentiate`."""

    def outputs(self, tokens: bytes, lengths: Int64Array) -> bytes:
        """See `RemoteBase.outputs`."""

    def activations(self, tokens: bytes, lengths: Int64Array) -> bytes:
        """See `RemoteBase.activations`."""

    def pull_back(
        self, tokens: bytes, lengths: Int64Array, upstream: Callable[[bytes], bytes]
    ) -> tuple[bytes, bytes]:
        """The outputs, and the gradient by the tokens: see `RemoteBase.pull_back`."""


class Channel:
    """A `RemoteBase` that gets and gives what is left of the values after their encoding.

    What was carried in vain, because the other side had to be asked again, is not counted.
    """

    def __init__(self, carrier: Carrier, encoding: Encoding, meter: Meter, rungs: int = 0) -> None:
        """`rungs` is the base model's."""
        self._carrier = carrier
        self._encoding = encoding
        self._meter = meter
        self._outputs = OutputCoding(rungs, encoding)

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

    def outputs(self, embeddings: Float32Array, lengths: Int64Array) -> Float32Array:
        """See `RemoteBase.outputs`."""
        sent = pack(embeddings, lengths, self._encoding)
        found = self._carrier.outputs(sent, lengths)
        passed = len(sent) + len(found)
        self._meter.add(CutTraffic(evaluated=len(lengths), evaluation_bytes=passed))
        return self._decoded(found, embeddings)

    def activations(self, embeddings: Float32Array, lengths: Int64Array) -> Float32Array:
        """See `RemoteBase.activations`."""
        sent = pack(embeddings, lengths, self._encoding)
        found = self._carrier.activations(sent, lengths)
        self._count(lengths, len(sent), len(found))
        return self._decoded(found, embeddings)

    def pull_back(
        self,
        embeddings: Float32Array,
        lengths: Int64Array,
        upstream: Callable[[Float32Array], Float32Array],
    ) -> Float32Array:
        """See `RemoteBase.pull_back`."""
        sent = pack(embeddings, lengths, self._encoding)

        def encoded(outputs: bytes) -> bytes:
            gradient = upstream(self._decoded(outputs, embeddings))
            _check_finite(gradient)
            return self._outputs.encode(gradient)

        outputs, gradient = self._carrier.pull_back(sent, lengths, encoded)
        found = self._unpacked(gradient, lengths, embeddings.shape)
        # The gradient by the outputs is as long as they are.
        self._count(lengths, len(sent) + len(outputs), len(gradient) + len(outputs))
        return found

    def _decoded(self, outputs: bytes, embeddings: Float32Array) -> Float32Array:
        """Of examples with these embeddings."""
        examples, _, width = embeddings.shape
        # How many answers there are only the carrier knows, and it has looked.
        values = width if self._outputs.rungs else len(outputs) // (4 * examples)
        try:
            return self._outputs.decode(outputs, examples, values)
        except MalformedMessage as error:
            raise TrainingError(f"the base model's outputs are none: {error}") from error

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

    def __init__(self, remote: RemoteBase, width: int, encoding: Encoding, rungs: int = 0) -> None:
        """`width` is that of the base model's embeddings; `rungs` are its states, 0 for scores."""
        self._remote, self._width, self._encoding = remote, width, encoding
        self._outputs = OutputCoding(rungs, encoding)

    def differentiate(
        self, tokens: bytes, lengths: Int64Array, labels: Int64Array
    ) -> tuple[Float32Array, bytes]:
        """See `Carrier.differentiate`."""
        losses, gradient = self._remote.differentiate(self._there(tokens, lengths), lengths, labels)
        return losses, pack(gradient, lengths, self._encoding)

    def outputs(self, tokens: bytes, lengths: Int64Array) -> bytes:
        """See `Carrier.outputs`."""
        return self._outputs.encode(self._remote.outputs(self._there(tokens, lengths), lengths))

    def activations(self, tokens: bytes, lengths: Int64Array) -> bytes:
        """See `Carrier.activations`."""
        return self._outputs.encode(self._remote.activations(self._there(tokens, lengths), lengths))

    def pull_back(
        self, tokens: bytes, lengths: Int64Array, upstream: Callable[[bytes], bytes]
    ) -> tuple[bytes, bytes]:
        """See `Carrier.pull_back`."""
        seen: list[bytes] = []

        def carried(outputs: Float32Array) -> Float32Array:
            seen.append(self._outputs.encode(outputs))
            values = outputs.shape[1] // max(1, self._outputs.rungs)
            return self._outputs.decode(upstream(seen[-1]), len(outputs), values)

        gradient = self._remote.pull_back(self._there(tokens, lengths), lengths, carried)
        return seen[-1], pack(gradient, lengths, self._encoding)

    def _there(self, tokens: bytes, lengths: Int64Array) -> Float32Array:
        return unpack(tokens, lengths, (int(lengths.max()), self._width), self._encoding)


def pack(values: Float32Array, lengths: Int64Array, encoding: Encoding) -> bytes:
    """The tokens of `[n, longest, width]` that count, encoded; `TrainingError` if not finite."""
    found = values[_counting(values.shape[1], lengths)]
    _check_finite(found)
    return encode(found, encoding)


def _check_finite(values: Float32Array) -> None:
    if not np.isfinite(values).all():
        raise TrainingError(
            "an embedding or a gradient is not finite: training has diverged; lower train.lr"
        )


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


def in_process_channel(
    remote: RemoteBase, width: int, encoding: Encoding, meter: Meter, rungs: int = 0
) -> Channel:
    """A channel to a base model in this process, whose embeddings have `width` values."""
    return Channel(InProcessCarrier(remote, width, encoding, rungs), encoding, meter, rungs)
