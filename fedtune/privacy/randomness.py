"""Random numbers that an attacker cannot predict, fast enough for one per adapter value."""

from __future__ import annotations

import builtins
import math
import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

_ZEROS = bytes(1 << 20)
_CHUNK = 1 << 16


class SecureRandom:
    """A stream of AES-256 in counter mode under a key from the operating system.

    Every instance has its own key, and there is no way to seed one: noise that somebody can
    repeat protects nobody. A process that was forked goes on with a key of its own. Not to be
    shared between threads.
    """

    def __init__(self) -> None:
        self._start()

    def __repr__(self) -> str:
        return "SecureRandom()"

    def _start(self) -> None:
        self._process = os.getpid()
        # A nonce keeps apart the streams under one key. Here a key has one stream, so zero is
        # as good as any; the counter of 128 bits does not come round.
        cipher = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(bytes(16)))
        self._stream = cipher.encryptor()

    def bytes(self, n: int) -> builtins.bytes:
        """The next `n` bytes."""
        if self._process != os.getpid():
            self._start()  # the parent holds the same key and counter
        lengths = [min(len(_ZEROS), n - start) for start in range(0, n, len(_ZEROS))]
        return b"".join(self._stream.update(_ZEROS[:length]) for length in lengths)

    def uint64(self, n: int) -> NDArray[np.uint64]:
        """uint64 `[n]`, uniform over all values; read-only."""
        return np.frombuffer(self.bytes(8 * n), np.uint64)

    def uniform(self, n: int) -> NDArray[np.float64]:
        """float64 `[n]`, uniform over the 2⁵³ multiples of 2⁻⁵³ in (0, 1]: its logarithm exists."""
        integers = (self.uint64(n) >> np.uint64(11)) + np.uint64(1)
        return integers.astype(np.float64) * 2.0**-53

    def gaussian(self, n: int) -> NDArray[np.float64]:
        """float64 `[n]`, standard normal.

        Each value is half the sum of four independent Box-Muller normals. The floating-point
        values that one Box-Muller normal can reach give away the value to which it was added;
        of a sum of four there are too many to search (Holohan and Braghin 2021, arXiv
        2107.10138, section 5.1). Opacus does the same in its secure mode.
        """
        values = np.empty(n)
        for start in range(0, n, _CHUNK):
            part = values[start : start + _CHUNK]
            part[...] = self._gaussian(part.size)
        return values

    def gamma(self, n: int, shape: int) -> NDArray[np.float64]:
        """float64 `[n]`, Gamma of an integer `shape` of at least 1, scale 1.

        The sum of `shape` exponentials, each the logarithm of a uniform number.
        """
        values = np.empty(n)
        rows = max(1, _CHUNK // shape)
        for start in range(0, n, rows):
            part = values[start : start + rows]
            part[...] = -np.log(self.uniform(part.size * shape)).reshape(-1, shape).sum(1)
        return values

    def _gaussian(self, n: int) -> NDArray[np.float64]:
        half = (n + 1) // 2
        total = np.zeros((2, half))
        for _ in range(4):
            radius = np.sqrt(-2 * np.log(self.uniform(half)))
            angle = 2 * math.pi * self.uniform(half)
            total[0] += radius * np.cos(angle)
            total[1] += radius * np.sin(angle)
        return total.ravel()[:n] / 2
