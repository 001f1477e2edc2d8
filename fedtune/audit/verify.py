"""A whole audit log, verified line by line by somebody who has its writer's public key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fedtune.audit.entry import LARGEST_LINE, Entry, Event, Head, digest_of_line, genesis
from fedtune.errors import BrokenAuditLog, ConfigError

# The public key (Ed25519, 32 bytes) of the writer with this name; `ValueError` if unknown.
KeyOf = Callable[[str], bytes]


@dataclass
class Findings:
    """What a log says that is sound."""

    writer: str = ""
    head: Head = field(default_factory=lambda: Head(0, ""))
    first: str = ""
    last: str = ""
    events: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def verify_log(path: Path, key_of: KeyOf, head: Head | None = None) -> Findings:
    """What the log at `path` says; `head` is an entry that somebody was told of.

    Raises `BrokenAuditLog` for the first line that is wrong, and `ConfigError` for a file that
    cannot be read.
    """
    found = Findings()
    for entry, digest in read_log(path, key_of):
        if entry.number == 1:
            found.writer, found.first = str(entry.details["writer"]), entry.time
        if entry.time < found.last:
            found.notes.append(
                f"the clock was set back before entry {entry.number}: from {found.last} to "
                f"{entry.time}"
            )
        if head is not None and head.number == entry.number and head.digest != digest:
            raise BrokenAuditLog(
                entry.number, f"not the entry that --head names: its SHA-256 is {digest}"
            )
        found.last, found.head = entry.time, Head(entry.number, digest)
        found.events[entry.event] += 1
    if head is not None and head.number > found.head.number:
        missing = found.head.number + 1
        raise BrokenAuditLog(missing, f"not there, but --head is of entry {head.number}")
    return found


def read_log(path: Path, key_of: KeyOf) -> Iterator[tuple[Entry, str]]:
    """Each entry that verifies with its digest, up to one that does not: `BrokenAuditLog`."""
    previous, key = "", b""
    for number, line in enumerate(_lines(path), 1):
        try:
            entry = Entry.read(line)
            if number == 1:
                writer = _writer(entry)
                key = key_of(writer)
                if entry.details.get("public-key") != key.hex():
                    raise ValueError("the log was begun with another key than its writer has")
                previous = genesis(writer, key)
            if entry.number != number:
                raise ValueError(f"it is entry {entry.number}")
            if entry.previous != previous:
                raise ValueError("it does not follow the line before it")
            entry.verify(key)
        except ValueError as error:
            raise BrokenAuditLog(number, str(error)) from error
        previous = digest_of_line(line)
        yield entry, previous


def _writer(entry: Entry) -> str:
    writer = entry.details.get("writer")
    if entry.event is not Event.LOG_BEGUN or not isinstance(writer, str):
        raise ValueError("it does not say whose log it begins")
    return writer


def _lines(path: Path) -> Iterator[bytes]:
    number = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(LARGEST_LINE + 1):
                number += 1
                if not line.endswith(b"\n"):
                    raise BrokenAuditLog(
                        number,
                        f"it does not end within {LARGEST_LINE} bytes. A power cut can leave such "
                        "a last line; when the writer starts again it is cut off, which is then "
                        "an entry",
                    )
                yield line[:-1]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if not number:
        raise BrokenAuditLog(1, "there is none, and a log has at least one")
