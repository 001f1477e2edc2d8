"""What a site remembers: its part in each round, the privacy it has spent, its private part.

One SQLite file. A session's state is made durable before the answer that it stands for is sent,
so a site that is killed at any moment and started again says nothing twice.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from fedtune.errors import BudgetExceeded, ClientFailure, ProtocolViolation, RunFolderError
from fedtune.files import transaction
from fedtune.privacy.accountant import Ledger, Release
from fedtune.secagg.client import ClientSession, Stage
from fedtune.secagg.keys import Identity
from fedtune.secagg.saved import dump, load
from fedtune.secagg.session import Session
from fedtune.types import Float32Vector

_SCHEMA = """
CREATE TABLE IF NOT EXISTS identities (name TEXT PRIMARY KEY, private_key BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS sessions (
    client TEXT NOT NULL,
    run_id TEXT NOT NULL,
    round INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    session BLOB NOT NULL,        -- digest
    adapter_digest TEXT NOT NULL,
    stage TEXT NOT NULL,
    state BLOB NOT NULL,          -- secret: keys and shares of this one session
    repeats TEXT NOT NULL,        -- JSON: cohort that has this round's values already
    request BLOB NOT NULL,        -- SHA-256 of what was answered last
    answer BLOB NOT NULL,         -- and the answer
    PRIMARY KEY (client, run_id)  -- only the last one is kept
) STRICT;
CREATE TABLE IF NOT EXISTS runs (
    client TEXT NOT NULL,
    agreement TEXT NOT NULL,      -- digests of roster and configuration
    run_id TEXT NOT NULL,
    PRIMARY KEY (client, agreement)
) STRICT;
CREATE TABLE IF NOT EXISTS releases (
    client TEXT NOT NULL,
    run_id TEXT NOT NULL,
    release TEXT NOT NULL         -- JSON; rows are added and never changed
) STRICT;
CREATE TABLE IF NOT EXISTS private_parts (
    client TEXT NOT NULL,
    run_id TEXT NOT NULL,
    round INTEGER NOT NULL,       -- the last one trained in
    before BLOB NOT NULL,         -- little-endian float32: what that round began with
    after BLOB NOT NULL,          -- and ended with
    PRIMARY KEY (client, run_id)
) STRICT;
"""
logger = logging.getLogger(__name__)
# After these, a round's sum may be open: the site takes no further attempt at that round.
_FINAL = (Stage.SIGNED, Stage.REVEALED)


@dataclass(frozen=True)
class Charge:
    """What an answer releases, and the most epsilon at `delta` that it may bring a site to.

    `run_budget` is the federation's for its run; `site_budget` the site's own for all runs that
    it ever took part in, so that a server gains nothing by starting another.
    """

    release: Release
    delta: float
    run_budget: float
    site_budget: float

    def check(self, run: Ledger, every: Ledger) -> None:
        """Raise `BudgetExceeded` if the release, after these, is above a budget."""
        for ledger, budget, whose in (
            (run, self.run_budget, "this run's budget"),
            (every, self.site_budget, "this site's budget for all its runs"),
        ):
            spent = ledger.epsilon_with(self.release, self.delta)
            if not spent <= budget:
                raise BudgetExceeded(
                    f"round {self.release.round} would bring epsilon to {spent:.3f} at delta "
                    f"{self.delta:g}, above {whose} of {budget:g}"
                )


@dataclass(frozen=True)
class Answer:
    """What is going to be sent, and the SHA-256 of the request that it answers."""

    request: bytes
    payload: bytes = field(repr=False)


@dataclass(frozen=True)
class PrivatePart:
    """A client's private part of the adapter over one round (float32, in manifest order).

    Both ends of the round are kept: a round that is asked for again begins where it did before.
    """

    run_id: str
    round: int
    before: Float32Vector = field(repr=False)
    after: Float32Vector = field(repr=False)


@dataclass(frozen=True)
class SavedSession:
    """A session that a client is in.

    `repeats` are the clients of an earlier attempt at the round, if this one sent it values.
    """

    run_id: str
    round: int
    adapter_digest: str
    state: ClientSession
    repeats: tuple[str, ...] = ()


class SiteStore:
    """The memory of one site, or in a simulation of all of them in one file."""

    def __init__(self, path: Path, synchronous: Literal["FULL", "NORMAL"] = "FULL") -> None:
        """Open or make it. `NORMAL` survives the end of the process, not that of the machine."""
        self._path = path
        try:
            # The file is made for its owner alone before anything secret is in it.
            path.touch(mode=0o600, exist_ok=True)
            path.chmod(0o600)
            self._db = sqlite3.connect(path, isolation_level=None, timeout=60)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute(f"PRAGMA synchronous = {synchronous}")
            self._db.execute("PRAGMA secure_delete = ON")
            self._db.executescript(_SCHEMA)
        except (OSError, sqlite3.DatabaseError) as error:
            raise RunFolderError(f"{path}: not the memory of a site: {error}") from error

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def enrol(self, names: Iterable[str]) -> dict[str, Identity]:
        """The identities of `names`, made where they are not there yet."""
        fresh = [(name, Identity.generate(name).private_key) for name in names]
        with self._writing() as db:
            db.executemany("INSERT OR IGNORE INTO identities VALUES (?, ?)", fresh)
            rows = db.execute("SELECT name, private_key FROM identities ORDER BY name").fetchall()
        wanted = {name for name, _ in fresh}
        return {name: Identity(name, key) for name, key in rows if name in wanted}

    def join(self, client: str, run_id: str, agreement: str) -> None:
        """Take part in a run of the federation that `agreement` stands for, and in no other.

        The same training, summed up in two runs with one client less in the second, would
        give that client away. Raises `ProtocolViolation` for a second run.
        """
        with self._writing() as db:
            row = (client, agreement, run_id)
            db.execute("INSERT OR IGNORE INTO runs VALUES (?, ?, ?)", row)
            query = "SELECT run_id FROM runs WHERE client = ? AND agreement = ?"
            (joined,) = db.execute(query, (client, agreement)).fetchone()
        if joined != run_id:
            raise ProtocolViolation(
                f"this site takes part in run {joined} of this federation and in no second one; "
                "another run needs another configuration (its seed is enough) or roster, which "
                "the site agrees to by installing it"
            )

    def runs(self, client: str) -> list[str]:
        """The runs that the client has ever joined."""
        rows = self._db.execute("SELECT run_id FROM runs WHERE client = ?", (client,))
        return [run_id for (run_id,) in rows]

    def begin(self, client: str, session: Session, state: ClientSession, answer: Answer) -> None:
        """Take part in a session.

        Raises `ProtocolViolation` for a round before the last one, a round whose sum may be
        open already, or an attempt that is not a new one.
        """
        context = session.context
        with self._writing() as db:
            repeats: list[str] = []
            row = db.execute(
                "SELECT round, attempt, stage, state, repeats FROM sessions "
                "WHERE client = ? AND run_id = ?",
                (client, context.run_id),
            ).fetchone()
            if row is not None:
                number, attempt, stage, earlier, told = row
                if context.round < number:
                    raise ProtocolViolation(f"round {context.round} after round {number}")
                if context.round == number and stage in _FINAL:
                    raise ProtocolViolation(f"this client has finished round {number} already")
                if context.round == number and session.attempt <= attempt:
                    raise ProtocolViolation(f"attempt {session.attempt} after attempt {attempt}")
                if context.round == number:
                    repeats = json.loads(told)
                    if stage == Stage.MASKED:
                        repeats = [advert.client for advert in load(earlier).adverts]
            db.execute(
                "INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    client,
                    context.run_id,
                    context.round,
                    session.attempt,
                    session.digest,
                    session.adapter_digest,
                    state.stage,
                    dump(state),
                    json.dumps(repeats),
                    answer.request,
                    answer.payload,
                ),
            )

    def find(self, client: str, session: bytes) -> SavedSession:
        """The session with this digest; raises `ProtocolViolation` if the client is not in it."""
        row = self._db.execute(
            "SELECT run_id, round, adapter_digest, state, repeats FROM sessions "
            "WHERE client = ? AND session = ?",
            (client, session),
        ).fetchone()
        if row is None:
            raise ProtocolViolation("a message of a session that this client is not in")
        run_id, number, adapter_digest, state, repeats = row
        return SavedSession(run_id, number, adapter_digest, load(state), tuple(json.loads(repeats)))

    def place_of(self, client: str, session: bytes) -> tuple[str, int, int] | None:
        """Run, round and attempt of the session with this digest, if the client is in it."""
        row: tuple[str, int, int] | None = self._db.execute(
            "SELECT run_id, round, attempt FROM sessions WHERE client = ? AND session = ?",
            (client, session),
        ).fetchone()
        return row

    def answered(self, client: str, request: bytes) -> bytes | None:
        """The answer that was given, or should have been, to the last request of a session.

        `request` is its SHA-256. An answer can get lost with the connection or with the process;
        the same bytes once more tell nothing new.
        """
        row = self._db.execute(
            "SELECT answer FROM sessions WHERE client = ? AND request = ?", (client, request)
        ).fetchone()
        return None if row is None else bytes(row[0])

    def advance(
        self,
        before: ClientSession,
        after: ClientSession,
        answer: Answer,
        charge: Charge | None = None,
        private: PrivatePart | None = None,
    ) -> None:
        """Replace a session's state, enter what its answer releases, and keep `private`, at once.

        Raises `ProtocolViolation` if the session has gone on meanwhile, and `BudgetExceeded`.
        """
        with self._writing() as db:
            changed = db.execute(
                "UPDATE sessions SET stage = ?, state = ?, request = ?, answer = ? "
                "WHERE client = ? AND session = ? AND stage = ?",
                (
                    after.stage,
                    dump(after),
                    answer.request,
                    answer.payload,
                    before.name,
                    before.session,
                    before.stage,
                ),
            )
            if changed.rowcount != 1:
                raise ProtocolViolation("this client has answered already")
            if charge is not None:
                saved = self.find(before.name, before.session)
                self._enter(before.name, saved.run_id, charge)
            if private is not None:
                # Never without the charge: what later rounds send depends on it.
                self._keep(before.name, private)
        if after.stage is Stage.REVEALED:
            with self._told():
                # Deleted secrets are overwritten in the file, but older pages stay in its log.
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def charge(self, client: str, run_id: str, charge: Charge) -> None:
        """Enter a release outside of a session, before it leaves; or raise `BudgetExceeded`."""
        with self._writing():
            self._enter(client, run_id, charge)

    def check(self, client: str, run_id: str, charge: Charge) -> None:
        """Raise `BudgetExceeded` if `charge` is too much already, before there is any work."""
        found = self._releases(client)
        kind = charge.release.kind
        run = Ledger(release for owner, release in found if owner == run_id)
        charge.check(run, Ledger(release for _, release in found if release.kind == kind))

    def keep(self, client: str, private: PrivatePart) -> None:
        """Replace what `private_part` finds, outside of a session."""
        with self._writing():
            self._keep(client, private)

    def private_part(self, client: str, run_id: str, round_number: int) -> Float32Vector | None:
        """What the client's round begins with, float32; None if it has trained in none before.

        Raises `ProtocolViolation` for a round before the last one that it trained in.
        """
        row = self._db.execute(
            "SELECT round, before, after FROM private_parts WHERE client = ? AND run_id = ?",
            (client, run_id),
        ).fetchone()
        if row is None:
            return None
        last, before, after = row
        if round_number < last:
            raise ProtocolViolation(
                f"round {round_number} after round {last}: the private part of then is gone"
            )
        return np.frombuffer(before if round_number == last else after, "<f4").astype(np.float32)

    def ledger(self, client: str, run_id: str) -> Ledger:
        """All that the client has released in a run."""
        return Ledger(release for owner, release in self._releases(client) if owner == run_id)

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction; raises `ClientFailure` if the disk is full or broken."""
        with self._told(), transaction(self._db) as db:
            yield db

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            # The server hears why, but not where.
            logger.error(
                "%s: cannot be written: %s; no answer leaves before it is", self._path, error
            )
            raise ClientFailure(f"this site's memory cannot be written: {error}") from error

    def _enter(self, client: str, run_id: str, charge: Charge) -> None:
        # In the transaction of the entry: of two processes, one sees what the other took.
        self.check(client, run_id, charge)
        entry = json.dumps(Ledger([charge.release]).to_json())
        self._db.execute("INSERT INTO releases VALUES (?, ?, ?)", (client, run_id, entry))

    def _keep(self, client: str, private: PrivatePart) -> None:
        before, after = (v.astype("<f4").tobytes() for v in (private.before, private.after))
        self._db.execute(
            "INSERT OR REPLACE INTO private_parts VALUES (?, ?, ?, ?, ?)",
            (client, private.run_id, private.round, before, after),
        )

    def _releases(self, client: str) -> list[tuple[str, Release]]:
        """Everything that the client has ever released, by run, the oldest first."""
        rows = self._db.execute(
            "SELECT run_id, release FROM releases WHERE client = ? ORDER BY rowid", (client,)
        ).fetchall()
        return [
            (run_id, release)
            for run_id, text in rows
            for release in Ledger.from_json(json.loads(text)).releases
        ]
