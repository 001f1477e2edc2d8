"""Bytes to hash and sign: a label, then fields that each carry their length.

Two different lists of fields can never give the same bytes, and nothing that is signed for one
purpose can pass for another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

DIGEST_BYTES = 32
PREFIX = b"fedtune v1 "


def transcript(label: str, fields: Iterable[bytes]) -> bytes:
    """`label` and `fields` as one unambiguous string of bytes."""
    parts = [PREFIX + label.encode(), *fields]
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def digest(label: str, fields: Iterable[bytes]) -> bytes:
    """SHA-256 of the transcript, 32 bytes."""
    return hashlib.sha256(transcript(label, fields)).digest()


def number(value: int) -> bytes:
    """A whole number from 0 below 2^64 as a field."""
    return value.to_bytes(8, "little")
