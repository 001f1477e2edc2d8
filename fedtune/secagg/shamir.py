"""Shamir's secret sharing of 32-byte secrets (Shamir 1979).

Over the integers modulo the smallest prime above 2^256. Any `threshold` shares give the secret
back; fewer say nothing about it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

SECRET_BYTES = 32
SHARE_BYTES = 33
PRIME = 2**256 + 297


def split(secret: bytes, threshold: int, shares: int) -> list[bytes]:
    """`shares` shares of `secret`; the share at place i belongs to the point i + 1."""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret of {len(secret)} bytes, not {SECRET_BYTES}")
    if not 1 <= threshold <= shares:
        raise ValueError(f"a threshold of {threshold} among {shares} shares")
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    polynomial = [*coefficients, int.from_bytes(secret, "little")]
    return [
        _evaluate(polynomial, point).to_bytes(SHARE_BYTES, "little") for point in _points(shares)
    ]


def weights(points: Sequence[int]) -> dict[int, int]:
    """Lagrange's weights of the different `points` (from 1) for the value at zero."""
    if len(set(points)) != len(points) or any(not 0 < p < PRIME for p in points):
        raise ValueError("points must be different and above 0")
    found = {}
    for own in points:
        numerator = denominator = 1
        for other in points:
            if other != own:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - own) % PRIME
        found[own] = numerator * pow(denominator, -1, PRIME) % PRIME
    return found


def combine(shares: Mapping[int, bytes], at_zero: Mapping[int, int]) -> bytes | None:
    """The secret from `shares` by point and `weights` of the same points.

    None if the shares do not lie on a polynomial whose value at zero is 32 bytes long, which
    shares of one secret always do.
    """
    if shares.keys() != at_zero.keys():
        raise ValueError("shares and weights are of different points")
    total = sum(int.from_bytes(share, "little") * at_zero[p] for p, share in shares.items())
    secret = total % PRIME
    return secret.to_bytes(SECRET_BYTES, "little") if secret >> 256 == 0 else None


def is_share(data: bytes) -> bool:
    """Whether `data` is the encoding of a value below the prime."""
    return len(data) == SHARE_BYTES and int.from_bytes(data, "little") < PRIME


def _points(shares: int) -> range:
    return range(1, shares + 1)


def _evaluate(polynomial: Sequence[int], point: int) -> int:
    """Horner's rule, reduced once at the end; coefficients from the highest degree down."""
    value = 0
    for coefficient in polynomial:
        value = value * point + coefficient
    return value % PRIME
