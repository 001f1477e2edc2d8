"""The journal: one SQLite file in which a round happens once, or not at all.

A round is one transaction: its record, the new adapter and the rule's state. Kill the process
at any instruction and the next one finds either the whole round or nothing of it.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from pathlib import Path
from typing import Self

import numpy as np
from safetensors.numpy import load, save

from fedtune.errors import RunFolderError
from fedtune.files import transaction
from fedtune.privacy.accountant import Ledger, Release
from fedtune.records import RoundRecord
from fedtune.round.server import GlobalState

FORMAT = 3

_IDENTITY = "CREATE TABLE identity (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT"
_ROUNDS = """
CREATE TABLE rounds (
    round INTEGER PRIMARY KEY,
    record TEXT,               -- JSON; NULL for round 0, the state before training
    adapter BLOB,              -- little-endian float32, manifest order; only first, best, last
    rule_state BLOB            -- safetensors; only of the last round
) STRICT
"""
# The round that is under way, if clients were asked anything that must not be forgotten.
_OPEN_ROUND = """
CREATE TABLE open_round (
    round INTEGER PRIMARY KEY,
    attempt INTEGER NOT NULL,
    asked INTEGER NOT NULL,    -- whether clients were asked for values, in any attempt
    sealed BLOB                -- what it takes to open the sum, once all values are in
) STRICT
"""
_RELEASES = "CREATE TABLE releases (release TEXT NOT NULL) STRICT"
# Journals open in this process: a record lock does not tell its own process apart.
_open_here: set[Path] = set()


class Journal:
    """The committed rounds of one run. One process at a time holds it open."""

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: int) -> None:
        self._path = path
        self._db = connection
        self._lock = lock
        self._closed = False

    @classmethod
    def create(cls, path: Path, identity: dict[str, str], state: GlobalState) -> Self:
        """A new journal whose round 0 is `state`; `identity` says what the run is about."""
        if path.exists():
            raise RunFolderError(f"{path} exists already")
        lock = _lock(path)
        journal = cls(path, _connect(path), lock)
        with transaction(journal._db) as db:
            db.execute(_IDENTITY)
            for table in (_ROUNDS, _OPEN_ROUND, _RELEASES):
                db.execute(table)
            rows = {**identity, "format": str(FORMAT)}.items()
            db.executemany("INSERT INTO identity VALUES (?, ?)", rows)
            db.execute("INSERT INTO rounds VALUES (0, NULL, ?, ?)", _blobs(state))
        return journal

    @classmethod
    def open(cls, path: Path) -> Self:
        """An existing journal; raises `RunFolderError` if it is none or is in use."""
        if not path.is_file():
            raise RunFolderError(f"{path}: no such journal, so not the folder of a run")
        lock = _lock(path)
        try:
            journal = cls(path, _connect(path), lock)
            found = journal.identity().get("format")
            if journal._last() < 0:
                raise sqlite3.DatabaseError("it has no rounds")
        except sqlite3.DatabaseError as error:
            _unlock(path, lock)
            raise RunFolderError(f"{path}: not a journal: {error}") from error
        if found != str(FORMAT):
            journal.close()
            raise RunFolderError(f"{path}: journal format {found}, this fedtune reads {FORMAT}")
        return journal

    def close(self) -> None:
        """Let another process have it; a second time is harmless."""
        if not self._closed:
            self._closed = True
            self._db.close()
            _unlock(self._path, self._lock)

    def identity(self) -> dict[str, str]:
        """What the run is about: run id and the digests agreed upon."""
        return dict(self._db.execute("SELECT key, value FROM identity"))

    def commit(self, record: RoundRecord, state: GlobalState) -> None:
        """Make the round that follows the last one part of the run, all of it at once."""
        with transaction(self._db) as db:
            expected = self._last() + 1
            if record.round != expected:
                raise ValueError(f"round {record.round} cannot follow round {expected - 1}")
            db.execute(
                "INSERT INTO rounds VALUES (?, ?, ?, ?)",
                (record.round, json.dumps(record.to_json()), *_blobs(state)),
            )
            db.execute("DELETE FROM open_round WHERE round <= ?", [record.round])
            # Old states would be most of the file: round 0, the best and the last are kept.
            keep = [0, record.round, self._best() or 0]
            db.execute("UPDATE rounds SET adapter = NULL WHERE round NOT IN (?, ?, ?)", keep)
            db.execute("UPDATE rounds SET rule_state = NULL WHERE round < ?", [record.round])

    def next_attempt(self, round_number: int) -> int:
        """Number of a new attempt at a round, from 1; never the same twice."""
        with transaction(self._db) as db:
            db.execute(
                "INSERT INTO open_round VALUES (?, 1, 0, NULL) "
                "ON CONFLICT (round) DO UPDATE SET attempt = attempt + 1",
                [round_number],
            )
            query = "SELECT attempt FROM open_round WHERE round = ?"
            return int(db.execute(query, [round_number]).fetchone()[0])

    def ask_for_values(self, round_number: int) -> None:
        """From now on clients may have sent values that they repeat to no other cohort."""
        with transaction(self._db) as db:
            db.execute("UPDATE open_round SET asked = 1 WHERE round = ?", [round_number])

    def asked_for_values(self, round_number: int) -> bool:
        """Whether `ask_for_values` was called for an attempt at the round."""
        query = "SELECT asked FROM open_round WHERE round = ?"
        row = self._db.execute(query, [round_number]).fetchone()
        return bool(row and row[0])

    def seal(self, round_number: int, sealed: bytes, release: Release | None) -> None:
        """Keep what it takes to open a round's sum, and charge the release of it, at once."""
        with transaction(self._db) as db:
            db.execute("UPDATE open_round SET sealed = ? WHERE round = ?", (sealed, round_number))
            if release is not None:
                entry = json.dumps(Ledger([release]).to_json())
                db.execute("INSERT INTO releases VALUES (?)", [entry])

    def sealed(self, round_number: int) -> tuple[int, bytes] | None:
        """Attempt, and what `seal` kept, if the round got that far and no further."""
        query = "SELECT attempt, sealed FROM open_round WHERE round = ? AND sealed NOT NULL"
        row = self._db.execute(query, [round_number]).fetchone()
        return None if row is None else (row[0], row[1])

    def ledger(self) -> Ledger:
        """All releases of the sums of this run; it only ever grows."""
        rows = self._db.execute("SELECT release FROM releases ORDER BY rowid")
        ledgers = [Ledger.from_json(json.loads(text)) for (text,) in rows]
        return Ledger(release for ledger in ledgers for release in ledger.releases)

    def records(self) -> list[RoundRecord]:
        """All committed rounds, in order."""
        rows = self._db.execute("SELECT record FROM rounds WHERE round > 0 ORDER BY round")
        return [RoundRecord.from_json(json.loads(text)) for (text,) in rows]

    def last_state(self) -> tuple[int, GlobalState]:
        """Number (0 before the first) and state of the last committed round."""
        number, adapter, rule_state = self._db.execute(
            "SELECT round, adapter, rule_state FROM rounds ORDER BY round DESC LIMIT 1"
        ).fetchone()
        vector = np.frombuffer(adapter, "<f4").astype(np.float32)
        return number, GlobalState(vector, load(rule_state))

    def _last(self) -> int:
        (number,) = self._db.execute("SELECT max(round) FROM rounds").fetchone()
        return -1 if number is None else int(number)

    def _best(self) -> int | None:
        evaluated = [r for r in self.records() if r.accuracy is not None or r.loss is not None]
        # Without classes there is no accuracy, and the loss decides.
        best = max(evaluated, key=lambda r: (r.accuracy or 0.0, -(r.loss or 0.0)), default=None)
        return best.round if best else None


def _blobs(state: GlobalState) -> tuple[bytes, bytes]:
    return state.adapter.astype("<f4").tobytes(), save(state.rule_state)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    # FULL: a committed round survives a power cut, not only the end of the process.
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _lock(path: Path) -> int:
    busy = f"{path.parent} is in use by another process; wait for it or end it"
    if path.resolve() in _open_here:
        raise RunFolderError(busy)
    try:
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunFolderError(f"{path.parent}: cannot be written: {error.strerror}") from error
    try:
        # A record lock and not flock: worker processes forked from this one do not hold it, so
        # it is free the moment that this process is gone.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        os.close(lock)
        raise RunFolderError(busy) from error
    _open_here.add(path.resolve())
    return lock


def _unlock(path: Path, lock: int) -> None:
    os.close(lock)
    _open_here.discard(path.resolve())
