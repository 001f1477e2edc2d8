"""Masks: 256-bit seeds, expanded to vectors that are uniform on the ring."""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedtune.secagg.ring import RingVector

SEED_BYTES = 32
# Key stream made at a time: input, output and a piece of the vector stay in the cache.
_PIECE_BYTES = 1 << 17
_ZEROS = bytes(_PIECE_BYTES)
# Some block modes want room for one more block in their output, less one byte.
_SLACK = 15


def add_mask(vector: RingVector, seed: bytes) -> None:
    """Add the mask of `seed` to `vector` (unsigned words, wrapping), in place."""
    _apply(vector, seed, np.add)


def subtract_mask(vector: RingVector, seed: bytes) -> None:
    """Take the mask of `seed` away from `vector` (unsigned words, wrapping), in place."""
    _apply(vector, seed, np.subtract)


def _apply(vector: RingVector, seed: bytes, operation: np.ufunc) -> None:
    """AES-256-CTR keyed by the seed gives one uniform word for each value.

    A word that is uniform modulo 2^32 (2^64) is uniform modulo any 2^bits that divides it, so
    nothing is rejected and nothing biased. The counter starts at zero for every mask: a seed
    is the key of this one stream only.
    """
    if len(seed) != SEED_BYTES:
        raise ValueError(f"a seed of {len(seed)} bytes, not {SEED_BYTES}")
    encryptor = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    buffer = np.empty(_PIECE_BYTES + _SLACK, np.uint8)
    stream = buffer[:_PIECE_BYTES].view(vector.dtype)
    per_piece = len(stream)
    zeros = memoryview(_ZEROS)
    for start in range(0, len(vector), per_piece):
        piece = vector[start : start + per_piece]
        encryptor.update_into(zeros[: piece.nbytes], buffer.data)
        operation(piece, stream[: len(piece)], out=piece)
