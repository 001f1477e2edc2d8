"""One entry of an audit log: a line of JSON, chained to the line before it, signed by its writer.

There is one way to write an entry (`Entry.line`); a line in any other spelling is refused, so
that each byte of a log counts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedtune.secagg.keys import SIGNATURE_BYTES, Identity
from fedtune.secagg.transcript import digest, transcript
from fedtune.types import sha256_hex

LARGEST_LINE = 4 << 20  # bytes; the longest name every site of a federation
Value = str | bool | int | float | tuple[str, ...]
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
_DIGEST = re.compile("[0-9a-f]{64}")
_SIGNATURE = re.compile(f"[0-9a-f]{{{2 * SIGNATURE_BYTES}}}")


class Event(StrEnum):
    """What an entry is about."""

    LOG_BEGUN = "log-begun"
    TORN_LINE_REMOVED = "torn-line-removed"
    SERVER_STARTED = "server-started"
    SERVER_STOPPED = "server-stopped"
    CLIENT_JOINED = "client-joined"
    CLIENT_LEFT = "client-left"
    CLIENT_REFUSED = "client-refused"
    ROUND_COMMITTED = "round-committed"
    ROUND_LOST = "round-lost"
    RUN_ENDED = "run-ended"
    SITE_STARTED = "site-started"
    RUN_JOINED = "run-joined"
    REQUEST_ANSWERED = "request-answered"
    REQUEST_REFUSED = "request-refused"
    REQUEST_FAILED = "request-failed"


@dataclass(frozen=True)
class Head:
    """The last entry of a log: its number, and the SHA-256 of its line in hexadecimal.

    Whoever was told it finds out later if the log was cut off before it, or written anew.
    """

    number: int
    digest: str

    def __str__(self) -> str:
        return f"{self.number}:{self.digest}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The head that `str` gives; raises `ValueError`."""
        number, colon, found = text.partition(":")
        if not (colon and number.isascii() and number.isdecimal() and int(number) > 0):
            raise ValueError(f"{text!r} is no head of a log; it is NUMBER:SHA-256")
        if not _DIGEST.fullmatch(found):
            raise ValueError(f"{text!r} is no head of a log; a SHA-256 has 64 digits, 0-9 and a-f")
        return cls(int(number), found)


@dataclass(frozen=True)
class Entry:
    """An entry; `time` is UTC in ISO 8601, `previous` the SHA-256 of the line before (hex)."""

    number: int
    time: str
    event: Event
    details: Mapping[str, Value]
    previous: str
    signature: str = ""

    @classmethod
    def signed_by(
        cls,
        identity: Identity,
        number: int,
        time: str,
        event: Event,
        details: Mapping[str, Value],
        previous: str,
    ) -> Self:
        """The entry with the signature of `identity`; raises `ValueError` for odd details."""
        _check_details(details)
        bare = cls(number, time, event, details, previous)
        signature = identity.sign(_signed(bare._body())).hex()
        return cls(number, time, event, details, previous, signature)

    @classmethod
    def read(cls, line: bytes) -> Self:
        """The entry in `line`, which has no newline; raises `ValueError`. See `verify`."""
        try:
            found: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError("it is not JSON") from error
        names = ("number", "time", "event", "details", "previous", "signature")
        if not isinstance(found, dict) or tuple(found) != names:
            raise ValueError(f"it is not an object of {', '.join(names)}")
        number, time, event, details, previous, signature = found.values()
        if type(number) is not int or number < 1:
            raise ValueError("its number is not a whole number from 1")
        _check_text("time", time, _TIME)
        _check_text("previous", previous, _DIGEST)
        _check_text("signature", signature, _SIGNATURE)
        if event not in list(Event):
            raise ValueError("its event is none that this version of fedtune knows")
        if not isinstance(details, dict):
            raise ValueError("its details are not an object")
        plain = {key: tuple(v) if isinstance(v, list) else v for key, v in details.items()}
        _check_details(plain)
        entry = cls(number, time, Event(event), plain, previous, signature)
        if entry.line() != line:
            raise ValueError("it is spelled in another way than such an entry is written")
        return entry

    def verify(self, key: bytes) -> None:
        """Raise `ValueError` unless the holder of the Ed25519 key (32 bytes) signed this."""
        try:
            public = Ed25519PublicKey.from_public_bytes(key)
            public.verify(bytes.fromhex(self.signature), _signed(self._body()))
        except InvalidSignature as error:
            raise ValueError("its signature is not that of the log's writer") from error

    def line(self) -> bytes:
        """The entry as it stands in the log, without the newline: ASCII."""
        return self._body()[:-1] + f',"signature":"{self.signature}"}}'.encode()

    def _body(self) -> bytes:
        value = {
            "number": self.number,
            "time": self.time,
            "event": self.event,
            "details": dict(sorted(self.details.items())),
            "previous": self.previous,
        }
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def genesis(name: str, key: bytes) -> str:
    """What the first entry has for the line before it: it binds the log to one writer."""
    return digest("audit genesis", [name.encode(), key]).hex()


def digest_of_line(line: bytes) -> str:
    """SHA-256 of a line without its newline, in hexadecimal."""
    return sha256_hex(line)


def _signed(body: bytes) -> bytes:
    return transcript("audit entry", [body])


def _check_text(name: str, value: object, pattern: re.Pattern[str]) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"its {name} is not of the right form")


def _check_details(details: Mapping[str, object]) -> None:
    for key, value in details.items():
        listed = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
        finite = not isinstance(value, float) or math.isfinite(value)
        if not (listed or (isinstance(value, str | bool | int | float) and finite)):
            raise ValueError(f"its detail {key} is no text, number, truth value or list of texts")
