"""An audit log that is written: opened by one process, added to, each entry on the disk at once."""

from __future__ import annotations

import datetime
import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from fedtune.audit.entry import LARGEST_LINE, Entry, Event, Head, Value, digest_of_line, genesis
from fedtune.errors import AuditLogError, AuditWriteError
from fedtune.files import sync_folder
from fedtune.secagg.keys import Identity
from fedtune.types import sha256_hex

_BLOCK = 64 << 10


class AuditLog:
    """The audit log of `identity`. Neither opening nor adding takes longer for a long log.

    Only its last lines are verified here: `fedtune.audit.verify` looks at all of it.
    """

    def __init__(self, path: Path, identity: Identity) -> None:
        """Go on with the log at `path`, or begin it.

        A last line that was torn by a power cut is cut off, and the next entry says so: it was
        never acknowledged. Raises `AuditLogError`, and changes nothing, if the log is in use, is
        another writer's, or does not verify at its end.
        """
        self._path, self._identity = path, identity
        # In the place of the line before the first one.
        self._head = Head(0, genesis(identity.name, identity.public_key))
        self._size = 0
        try:
            new = not path.exists()
            # For its owner alone from the first byte. O_APPEND: nothing is ever written over.
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            self._handle = os.open(path, flags, 0o600)
        except OSError as error:
            raise AuditLogError(f"{path}: cannot be opened: {error.strerror}") from error
        try:
            self._lock()
            torn = self._read_end()
            if new:
                sync_folder(path.parent)
            if torn:
                os.ftruncate(self._handle, self._size)
        except OSError as error:
            self.close()
            raise AuditLogError(f"{path}: cannot be opened: {error.strerror}") from error
        except BaseException:
            self.close()
            raise
        if not self._head.number:
            key = identity.public_key.hex()
            self.append(Event.LOG_BEGUN, {"writer": identity.name, "public-key": key})
        if torn:
            what: dict[str, Value] = {"bytes": len(torn), "sha256": sha256_hex(torn)}
            self.append(Event.TORN_LINE_REMOVED, what)

    @property
    def head(self) -> Head:
        """The last entry."""
        return self._head

    def append(self, event: Event, details: Mapping[str, Value]) -> None:
        """Add an entry; when this returns, it is on the disk.

        Raises `AuditWriteError`, after which the log takes no more entries.
        """
        now = datetime.datetime.now(datetime.UTC)
        entry = Entry.signed_by(
            self._identity,
            self._head.number + 1,
            now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            event,
            details,
            self._head.digest,
        )
        line = entry.line()
        if len(line) > LARGEST_LINE:
            raise AuditWriteError(f"{self._path}: an entry of {len(line)} bytes is too large")
        try:
            self._write(line + b"\n")
            self._head = Head(entry.number, digest_of_line(line))
        except OSError as error:
            self.close()
            raise AuditWriteError(
                f"{self._path}: cannot be written: {error.strerror}; nothing is done that is not "
                "in the audit log"
            ) from error
        except BaseException:
            # A signal: what is on the disk now is not known. Whoever opens the log next finds out.
            self.close()
            raise

    def entries_backwards(self) -> Iterator[Entry]:
        """What stands in the log, the last entry first, not verified; raises `AuditLogError`."""
        lines = _lines_backwards(self._path, self._handle, self._size)
        next(lines)  # what follows the last newline: nothing
        for line in lines:
            yield self._entry(line)

    @property
    def closed(self) -> bool:
        """Whether it takes no more entries."""
        return self._handle < 0

    def close(self) -> None:
        """Let another process have it; a second time is harmless."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AuditLogError(
                f"{self._path} is in use by another process; wait for it or end it"
            ) from error

    def _read_end(self) -> bytes:
        """Find the last entry and the end of its line; returns what is behind it."""
        size = os.fstat(self._handle).st_size
        lines = _lines_backwards(self._path, self._handle, size)
        torn, last, before = next(lines), next(lines, None), next(lines, None)
        self._size = size - len(torn)
        if last is None:
            return torn
        entry = self._entry(last)
        previous = self._head.digest if before is None else digest_of_line(before)
        try:
            entry.verify(self._identity.public_key)
            if entry.previous != previous:
                raise ValueError("it does not follow the line before it")
        except ValueError as error:
            raise self._broken(error) from error
        self._head = Head(entry.number, digest_of_line(last))
        return torn

    def _entry(self, line: bytes) -> Entry:
        try:
            return Entry.read(line)
        except ValueError as error:
            raise self._broken(error) from error

    def _broken(self, error: ValueError) -> AuditLogError:
        return AuditLogError(
            f"{self._path}: an entry at its end is not as this writer wrote it: {error}. Keep the "
            "file as evidence, and put the last copy that fedtune audit verify accepts in its place"
        )

    def _write(self, data: bytes) -> None:
        if self._handle < 0:
            raise OSError(0, "an earlier entry could not be written")
        status = os.fstat(self._handle)
        if status.st_size != self._size or not status.st_nlink:
            raise OSError(0, "somebody else has changed or removed it")
        written = 0
        while written < len(data):
            written += os.write(self._handle, data[written:])
        os.fsync(self._handle)
        self._size += len(data)


def _lines_backwards(path: Path, handle: int, end: int) -> Iterator[bytes]:
    """What precedes the offset `end`, line by line, the last first; first what has no newline."""
    rest = b""
    while end > 0:
        start = max(0, end - _BLOCK)
        rest, *lines = (os.pread(handle, end - start, start) + rest).split(b"\n")
        end = start
        if len(rest) > LARGEST_LINE:
            raise AuditLogError(f"{path}: not an audit log: a line has over {LARGEST_LINE} bytes")
        yield from reversed(lines)
    yield rest
