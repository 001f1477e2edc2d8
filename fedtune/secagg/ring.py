"""Integers modulo 2^bits, and how they are packed into just that many bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import MalformedMessage

# Elements of a ring: uint32 up to 32 bits, else uint64. Arithmetic wraps at the word; as
# 2^bits divides 2^32 and 2^64, it is enough to reduce once at the end.
RingVector = NDArray[Any]
# Bounds that let a value and its shift of up to 7 bits fit into one word.
MIN_BITS, MAX_BITS = 8, 56
_GROUPS = 1 << 13  # groups of eight values handled at a time, to stay in the cache


@dataclass(frozen=True)
class Ring:
    """The integers modulo 2^`bits`, 8 ≤ bits ≤ 56."""

    bits: int

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"a ring of {self.bits} bits; {MIN_BITS} to {MAX_BITS} are supported")

    @property
    def dtype(self) -> np.dtype[Any]:
        """Word in which elements are held and masks are drawn, little-endian."""
        return np.dtype("<u4") if self.bits <= 32 else np.dtype("<u8")

    @property
    def modulus(self) -> int:
        """2^bits."""
        return 1 << self.bits

    def reduce(self, words: RingVector) -> RingVector:
        """`words` modulo 2^bits, in place."""
        words &= words.dtype.type(self.modulus - 1)
        return words

    def lower(self, values: NDArray[np.int64]) -> RingVector:
        """Signed integers as elements; raises `ValueError` outside [-2^(bits-1), 2^(bits-1))."""
        half = self.modulus >> 1
        if values.size and not (-half <= int(values.min()) and int(values.max()) < half):
            raise ValueError(f"a value is outside the ring of {self.bits} bits")
        return self.reduce(values.astype(self.dtype, casting="unsafe"))

    def lift(self, words: RingVector) -> NDArray[np.int64]:
        """Ring elements as the signed integers in [-2^(bits-1), 2^(bits-1)), int64."""
        values = words.astype(np.int64)
        values -= (values >> (self.bits - 1)) << self.bits  # the top bit counts -2^(bits-1)
        return values

    def packed_bytes(self, size: int) -> int:
        """Length of `size` packed elements."""
        return -(-size * self.bits // 8)

    def pack(self, words: RingVector) -> bytes:
        """Reduced elements, `bits` bits each, least significant bit first."""
        # Eight values fill `bits` whole bytes. A row longer than the data keeps the last word
        # of the last group inside the buffer.
        groups = -(-len(words) // 8)
        data = np.zeros((groups + 1) * self.bits, np.uint8)
        for start in range(0, groups, _GROUPS):
            piece = words[8 * start : 8 * (start + _GROUPS)]
            for column, shift, view in self._columns(data, start, groups):
                values = piece[column::8].astype(view.dtype)
                view[: len(values)] |= values << view.dtype.type(shift)
        return data[: self.packed_bytes(len(words))].tobytes()

    def unpack(self, data: bytes, size: int) -> RingVector:
        """`size` elements; raises `MalformedMessage` for another length or non-zero padding."""
        if len(data) != self.packed_bytes(size):
            raise MalformedMessage(
                f"{len(data)} bytes are not {size} values of {self.bits} bits "
                f"({self.packed_bytes(size)} bytes)"
            )
        padding = len(data) * 8 - size * self.bits
        if padding and data[-1] >> (8 - padding):
            raise MalformedMessage("the padding after the last value is not zero")
        groups = -(-size // 8)
        padded = np.zeros((groups + 1) * self.bits, np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        words = np.empty(size, self.dtype)
        for start in range(0, groups, _GROUPS):
            piece = words[8 * start : 8 * (start + _GROUPS)]
            for column, shift, view in self._columns(padded, start, groups):
                target = piece[column::8]
                target[:] = (view[: len(target)] >> view.dtype.type(shift)).astype(self.dtype)
            self.reduce(piece)
        return words

    def _columns(
        self, data: NDArray[np.uint8], start: int, groups: int
    ) -> Iterator[tuple[int, int, RingVector]]:
        """For each of the eight columns: its number, shift, and the words that hold its values.

        The words of one column lie `bits` bytes apart, which is at least their own length, so
        they do not overlap.
        """
        count = min(_GROUPS, groups - start)
        for column in range(8):
            byte, shift = divmod(column * self.bits, 8)
            word = np.dtype("<u4" if self.bits + 7 <= 32 else "<u8")
            offset = start * self.bits + byte
            view = np.ndarray((count,), word, data.data, offset, (self.bits,))
            yield column, shift, view
