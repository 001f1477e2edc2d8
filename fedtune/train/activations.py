"""How embeddings and their gradients look on the wire between a client and the base model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import MalformedMessage

Encoding = Literal["float32", "float16", "bfloat16", "int8"]
ENCODINGS: tuple[Encoding, ...] = ("float32", "float16", "bfloat16", "int8")
_BYTES: dict[Encoding, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_SCALE = np.dtype("<f4")  # of each token in int8


def encoded_bytes(tokens: int, width: int, encoding: Encoding) -> int:
    """The only length that so many tokens can have."""
    return tokens * (width * _BYTES[encoding] + (_SCALE.itemsize if encoding == "int8" else 0))


def encode(tokens: NDArray[np.float32], encoding: Encoding) -> bytes:
    """Tokens, float32 `[n, width]`, little-endian.

    `int8` scales each token by its largest value, as gradients of tokens differ by orders of
    magnitude; the largest error is 1/254 of that value. A float16 that overflows is cut to the
    largest finite one.
    """
    if encoding == "float32":
        return tokens.astype("<f4", copy=False).tobytes()
    if encoding == "float16":
        largest = float(np.finfo(np.float16).max)
        return np.clip(tokens, -largest, largest).astype("<f2").tobytes()
    if encoding == "bfloat16":
        bits = np.ascontiguousarray(tokens, np.float32).view(np.uint32)
        # To the nearest, ties to even: what is cut off decides, and the last bit that stays.
        halves = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bytes(halves.astype("<u2").data)
    scale = np.abs(tokens).max(1, initial=0.0) / 127
    steps = np.divide(tokens, scale[:, None], out=np.zeros_like(tokens), where=scale[:, None] > 0)
    return b"".join((scale.astype(_SCALE).tobytes(), np.rint(steps).astype(np.int8).tobytes()))


def decode(data: bytes, tokens: int, width: int, encoding: Encoding) -> NDArray[np.float32]:
    """The tokens again, float32 `[tokens, width]`; raises `MalformedMessage` if not finite."""
    if len(data) != (expected := encoded_bytes(tokens, width, encoding)):
        raise MalformedMessage(f"{tokens} tokens in {len(data)} bytes, not {expected}")
    if encoding == "int8":
        scale = np.frombuffer(data, _SCALE, tokens)
        steps = np.frombuffer(data, np.int8, offset=scale.nbytes).reshape(tokens, width)
        found = steps * scale[:, None]
    elif encoding == "bfloat16":
        halves = np.frombuffer(data, "<u2").astype(np.uint32)
        found = (halves << 16).view(np.float32).reshape(tokens, width)
    else:
        found = np.frombuffer(data, "<f4" if encoding == "float32" else "<f2")
        found = found.reshape(tokens, width)
    if not np.isfinite(found).all():
        raise MalformedMessage("a value of a token is not finite")
    return found.astype(np.float32, copy=False)


@dataclass(frozen=True)
class OutputCoding:
    """How a base model's outputs and the gradients by them travel, `[n, size]` on both sides.

    States as embeddings do, `rungs` of them an example. Scores (`rungs` 0) are few: in float32.
    """

    rungs: int
    encoding: Encoding

    def encode(self, outputs: NDArray[np.float32]) -> bytes:
        """Outputs of examples, float32 `[n, size]`."""
        if not self.rungs:
            return encode(outputs, "float32")
        return encode(outputs.reshape(len(outputs) * self.rungs, -1), self.encoding)

    def decode(self, data: bytes, examples: int, values: int) -> NDArray[np.float32]:
        """They again; `values` are the answers, or those of a state. Raises `MalformedMessage`."""
        encoding = self.encoding if self.rungs else "float32"
        found = decode(data, examples * max(1, self.rungs), values, encoding)
        # What was decoded without a copy cannot be written to, which torch does not like.
        return np.require(found.reshape(examples, -1), requirements="W")
