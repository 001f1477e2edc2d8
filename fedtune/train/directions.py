"""An adapter as few numbers: how far it lies from a known start along known directions.

With `K` directions, `adapter(c) = start + Σ_k c_k z_k`. Who has the start and a seed makes each
direction again, so only the K coordinates `c` need to travel (Qin et al. 2024, arXiv 2312.06353).
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedtune.types import Float32Vector, Manifest, digest_of, sha256_hex


class Directions:
    """`count` directions of length 1 from `start` (float32 `[d]`), a vector of tensors `adapter`.

    Every other direction moves the tensors that are trained whole, such as a new head, and the
    rest moves LoRA's B matrices: a step along one that moves both would mostly be noise for the
    many values of B, which the slope at the few of a head decides. The A matrices stay as they
    are (Sun et al. 2024, arXiv 2403.12313), and so does what leads down in a NanoAdapter.

    Within what it moves, a direction has the same size everywhere and a random sign. Directions of
    one kind are nearly orthogonal: the length of `c` is about that of the adapter's change.
    """

    def __init__(self, adapter: Manifest, start: Float32Vector, seed: int, count: int) -> None:
        if start.shape != (adapter.size,):
            raise ValueError(f"a start of shape {start.shape}, manifest of {adapter.size}")
        self.adapter, self.start = adapter, start
        self.seed, self.count = seed, count
        self._moved = _moved(adapter)
        self._last = np.zeros(count, np.float32), start

    @cached_property
    def manifest(self) -> Manifest:
        """What travels: one tensor of `[count]` coordinates.

        Coordinates mean something only with their start and seed, so the name tells these apart.
        """
        start = sha256_hex(self.start.astype("<f4").tobytes())
        meaning = digest_of([self.adapter.digest, start, self.seed])
        return Manifest.of([(f"directions.{meaning}", (self.count,))])

    def move(self, adapter: Float32Vector, number: int, length: float) -> Float32Vector:
        """`adapter` moved by `length` along direction `number`; a new vector."""
        values = self._moved[number % len(self._moved)]
        moved = adapter.copy()
        moved[values] += np.float32(length / math.sqrt(len(values))) * self._signs(number)
        return moved

    def expand(self, coordinates: Float32Vector) -> Float32Vector:
        """The adapter at these coordinates (float32 `[count]`), float32 `[d]`.

        Value by value in one order, so that every machine gets the same.
        """
        if coordinates.shape != (self.count,):
            raise ValueError(f"coordinates of shape {coordinates.shape}, not [{self.count}]")
        # Parts of a test set are scored one after the other, at the same coordinates.
        if not np.array_equal(coordinates, self._last[0]):
            self._last = coordinates.copy(), self._expand(coordinates)
        return self._last[1].copy()

    def _expand(self, coordinates: Float32Vector) -> Float32Vector:
        adapter = self.start.astype(np.float64)
        for kind, values in enumerate(self._moved):
            total, part = np.zeros(len(values)), np.empty(len(values))
            for number in range(kind, self.count, len(self._moved)):
                if coordinates[number]:
                    np.multiply(self._signs(number), np.float64(coordinates[number]), out=part)
                    total += part
            adapter[values] += total / math.sqrt(len(values))
        return adapter.astype(np.float32)

    def _signs(self, number: int) -> NDArray[np.int8]:
        """Of the values that direction `number` moves, each −1 or 1, in manifest order.

        They are the bits of Philox4x64-10 (Salmon et al. 2011) with the key (seed, number), the
        least significant bit first: of numpy only what is the same in all its versions.
        """
        size = len(self._moved[number % len(self._moved)])
        key = np.array([self.seed, number], np.uint64)
        words = np.random.Philox(key=key).random_raw(-(-size // 64)).astype("<u8")
        bits = np.unpackbits(words.view(np.uint8), count=size, bitorder="little")
        signs: NDArray[np.int8] = bits.view(np.int8)
        signs *= 2
        signs -= 1
        return signs


def _moved(adapter: Manifest) -> list[NDArray[np.int64]]:
    """Which values (their places in the vector) directions of each kind move."""
    kinds: dict[bool, list[NDArray[np.int64]]] = {False: [], True: []}
    start = 0
    for tensor in adapter.tensors:
        if ".lora_A." not in tensor.name and ".down." not in tensor.name:
            kinds[".lora_B." in tensor.name].append(np.arange(start, start + tensor.size))
        start += tensor.size
    return [np.concatenate(places) for places in kinds.values() if places]
