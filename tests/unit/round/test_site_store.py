"""What a site remembers, and what the server does: real files, real processes, real kills."""

from __future__ import annotations

import math
import os
import pickle
import signal
import sqlite3
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from unit.round.masked_run import CLIENT_UNIT, MASKED, RECORD_UNIT, STAGES

from fedtune.errors import (
    BudgetExceeded,
    ClientFailure,
    ProtocolViolation,
    RunFolderError,
    WireError,
)
from fedtune.privacy.accountant import ClientRelease, Ledger, RecordRelease
from fedtune.records import RoundRecord
from fedtune.round.journal import Journal
from fedtune.round.server import GlobalState
from fedtune.round.site import Answer, Charge, SiteStore
from fedtune.secagg.client import ClientSession, Stage
from fedtune.secagg.keys import SERVER, Identity, Roster
from fedtune.secagg.session import Session
from fedtune.types import RoundContext

Forked = Callable[[Callable[[], None]], int]
FOUR = (7, 12, 5, 9)
IDENTITY = Identity.generate("a")
ROSTER = Roster({SERVER: Identity.generate(SERVER).public_key, "a": IDENTITY.public_key})
RELEASE = ClientRelease(1, 10.0, 100.0, 400.0)
ANSWER = Answer(b"q" * 32, b"the answer")
CHARGE = Charge(RELEASE, 1e-5, run_budget=math.inf, site_budget=math.inf)


def _session(round_number: int, attempt: int, run_id: str = "run") -> Session:
    context = RoundContext(run_id, round_number, "aa" * 32, "bb" * 32, "cc" * 32)
    return Session(context, attempt, "dd" * 32, ROSTER.digest)


def _begin(store: SiteStore, session: Session) -> ClientSession:
    state, _ = ClientSession.begin(IDENTITY, session)
    store.begin("a", session, state, ANSWER)
    return state


@pytest.fixture
def store(tmp_path: Path) -> SiteStore:
    return SiteStore(tmp_path / "site.db")


# ------------------------------------------------------------------------------- rounds only rise
NOT_FINAL = (Stage.ADVERTISED, Stage.SHARED, Stage.MASKED)


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize("round_number", [1, 2, 3])
@pytest.mark.parametrize("attempt", [1, 2, 3])
def test_which_session_may_follow(store, stage, round_number, attempt):
    """After attempt 2 at round 2, of which the client has done `stage`."""
    state = _begin(store, _session(2, 2))
    store.advance(state, replace(state, stage=stage), ANSWER)
    follows = round_number == 3 or (round_number == 2 and attempt == 3 and stage in NOT_FINAL)
    follows |= round_number == 2 and attempt == 3 and stage is Stage.ACCEPTED
    wanted = _session(round_number, attempt)
    if follows:
        _begin(store, wanted)
        assert store.find("a", wanted.digest).round == round_number
        with pytest.raises(ProtocolViolation):
            store.find("a", _session(2, 2).digest)
    else:
        with pytest.raises(ProtocolViolation):
            _begin(store, wanted)
        assert store.find("a", _session(2, 2).digest).state.stage is stage


def test_runs_do_not_know_of_each_other(store):
    _begin(store, _session(5, 1, "one"))
    _begin(store, _session(1, 1, "other"))
    with pytest.raises(ProtocolViolation):
        _begin(store, _session(4, 9, "one"))
    assert store.find("a", _session(5, 1, "one").digest).run_id == "one"
    assert store.find("a", _session(1, 1, "other").digest).run_id == "other"


def test_what_was_kept_is_what_is_found(tmp_path):
    store = SiteStore(tmp_path / "site.db")
    session = _session(1, 1)
    state = _begin(store, session)
    later = replace(state, stage=Stage.SIGNED, sharers=(0, 2), shares=(b"x" * 66,), survivors=(0,))
    store.advance(state, later, ANSWER)
    store.close()
    found = SiteStore(tmp_path / "site.db").find("a", session.digest)
    assert found.state == later
    assert (found.run_id, found.round, found.adapter_digest) == ("run", 1, "dd" * 32)


def test_a_state_is_replaced_once(store):
    state = _begin(store, _session(1, 1))
    shared = replace(state, stage=Stage.SHARED)
    store.advance(state, shared, ANSWER)
    with pytest.raises(ProtocolViolation):
        store.advance(state, shared, ANSWER, CHARGE)
    assert store.ledger("a", "run").releases == ()
    store.advance(shared, replace(state, stage=Stage.MASKED), ANSWER, CHARGE)
    with pytest.raises(ProtocolViolation):
        store.advance(shared, replace(state, stage=Stage.MASKED), ANSWER, CHARGE)
    assert store.ledger("a", "run").releases == (RELEASE,)


def test_a_session_that_is_over_cannot_go_on(store):
    """Another session of the client is at the very stage that the old one was at."""
    old = _begin(store, _session(1, 1))
    new = _begin(store, _session(1, 2))
    with pytest.raises(ProtocolViolation):
        store.advance(old, replace(old, stage=Stage.SHARED), ANSWER, CHARGE)
    assert store.find("a", _session(1, 2).digest).state == new
    assert store.ledger("a", "run").releases == ()


def test_a_secret_is_gone_from_the_disk_when_it_has_done_its_work(masked_federation, tmp_path):
    """Keys and self-masks when the values are masked, others' shares when they are revealed."""
    fed = masked_federation()

    def on_disk(secret: bytes) -> bool:
        files = [path for path in tmp_path.iterdir() if path.name.startswith("sites.db")]
        return any(secret.hex().encode() in path.read_bytes() for path in files)

    own: list[bytes] = []
    shares: list[bytes] = []
    opened, exchange = fed.federation.open_round()
    while exchange is not None:
        fed.hold(opened, exchange)
        states = [fed.kept(name).session for name in fed.names]
        if exchange.stage == "share":
            for state in states:
                own += [state.sealing.private_key, state.masking.private_key, state.self_mask]
                own += [state.own_shares]
            assert all(map(on_disk, own))
        if exchange.stage == "train":
            shares += [share for state in states for share in state.shares]
            assert all(map(on_disk, shares))
            fed.sites._opened()._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            assert not any(map(on_disk, own[:3]))
        exchange = opened.proceed()
    # The server was given one half of each share; the other halves were for nobody.
    assert not any(map(on_disk, [*own, *shares]))
    assert all(state.sealing.private_key == state.self_mask == b"" for state in states)


def test_a_store_is_for_its_owner_alone(tmp_path):
    path = tmp_path / "site.db"
    path.touch(mode=0o644)
    SiteStore(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_federation_has_one_run_at_a_site(store):
    store.join("a", "one", "federation")
    store.join("a", "one", "federation")
    with pytest.raises(ProtocolViolation, match="run one of this federation"):
        store.join("a", "other", "federation")
    store.join("a", "other", "another federation")
    store.join("b", "other", "federation")


@pytest.mark.parametrize("release", [RELEASE, RecordRelease(1, 0.5, 1.0, 3)])
def test_a_sites_budget_is_for_all_its_runs(store, release):
    """A server that starts another run starts another account of its own, not of the site's."""
    once, twice, thrice = (Ledger([release] * n).epsilon(1e-5) for n in (1, 2, 3))
    own = Charge(release, 1e-5, run_budget=math.inf, site_budget=(twice + thrice) / 2)
    store.charge("a", "first", own)
    store.charge("a", "second", own)
    with pytest.raises(BudgetExceeded, match="all its runs"):
        store.charge("a", "third", own)
    assert store.ledger("a", "third").releases == ()
    store.charge("b", "third", own)
    # The federation's budget is for its own run.
    store.charge("a", "third", replace(own, run_budget=once, site_budget=math.inf))
    with pytest.raises(BudgetExceeded, match="this run"):
        store.charge("a", "third", replace(own, run_budget=once, site_budget=math.inf))


def test_units_of_privacy_have_accounts_of_their_own(store):
    record = Charge(RecordRelease(1, 0.5, 1.0, 3), 1e-5, math.inf, math.inf)
    store.charge("a", "first", record)
    store.charge("a", "second", replace(CHARGE, site_budget=Ledger([RELEASE]).epsilon(1e-5)))


def test_a_charge_that_is_too_much_leaves_the_session_as_it_was(store):
    shared = replace(_begin(store, _session(1, 1)), stage=Stage.ADVERTISED)
    with pytest.raises(BudgetExceeded):
        store.advance(
            shared, replace(shared, stage=Stage.MASKED), ANSWER, replace(CHARGE, run_budget=0.0)
        )
    assert store.find("a", _session(1, 1).digest).state.stage is Stage.ADVERTISED
    assert store.ledger("a", "run").releases == ()


def test_a_full_disk_is_told_and_leaves_the_session_as_it_was(store):
    state = _begin(store, _session(1, 1))
    larger = replace(state, stage=Stage.SHARED, own_shares=bytes(200_000))
    [pages] = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages}")  # the same error as of a full disk
    for _ in range(2):
        with pytest.raises(ClientFailure, match="cannot be written: database or disk is full"):
            store.advance(state, larger, Answer(b"r" * 32, b"another"), CHARGE)
    assert store.find("a", _session(1, 1).digest).state == state
    assert store.answered("a", ANSWER.request) == ANSWER.payload
    assert store.ledger("a", "run").releases == ()
    store._db.execute("PRAGMA max_page_count = 100000")
    store.advance(state, larger, ANSWER, CHARGE)
    assert store.find("a", _session(1, 1).digest).state == larger


def test_only_the_last_session_is_in_the_file(tmp_path):
    store = SiteStore(tmp_path / "site.db")
    old = _begin(store, _session(1, 1))
    _begin(store, _session(2, 1))
    store.close()
    secret = old.self_mask.hex().encode()
    left = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert secret not in left


def test_ledgers_are_of_one_client_and_one_run(store):
    other = replace(RELEASE, round=2)
    store.charge("a", "run", CHARGE)
    store.charge("a", "run", CHARGE)
    store.charge("b", "run", replace(CHARGE, release=other))
    store.charge("a", "else", replace(CHARGE, release=other))
    assert store.ledger("a", "run").releases == (RELEASE, RELEASE)
    assert store.ledger("b", "run").releases == (other,)
    assert store.ledger("c", "run").releases == ()
    record = RecordRelease(1, 0.5, 1.0, 3)
    store.charge("d", "run", replace(CHARGE, release=record))
    assert store.ledger("d", "run").releases == (record,)


@pytest.mark.parametrize("umask", [0, 0o077])
def test_only_the_owner_can_read_it(tmp_path, umask):
    path = tmp_path / "site.db"
    before = os.umask(umask)
    try:
        store = SiteStore(path)
        store.enrol(["a"])
        _begin(store, _session(1, 1))
        names = sorted(tmp_path.iterdir())
        modes = {stat.S_IMODE(name.stat().st_mode) for name in names}
    finally:
        os.umask(before)
    assert len(names) > 1  # the write-ahead log too
    assert modes == {0o600}


@pytest.mark.parametrize("content", [b"not a database" * 99, b"SQLite format 3\0" + b"\1" * 5000])
def test_a_file_that_is_no_memory(tmp_path, content):
    path = tmp_path / "site.db"
    path.write_bytes(content)
    with pytest.raises(RunFolderError):
        SiteStore(path)
    with pytest.raises(RunFolderError):
        SiteStore(tmp_path / "no" / "folder.db")


def test_keys_are_made_once(tmp_path):
    first = SiteStore(tmp_path / "site.db").enrol(["", "a", "b"])
    again = SiteStore(tmp_path / "site.db").enrol(["b", "c", ""])
    assert again["b"] == first["b"]
    assert again[""] == first[""]
    assert set(again) == {"", "b", "c"}
    assert len({key.private_key for key in (*first.values(), again["c"])}) == 4


def test_durability_is_what_was_asked_for(tmp_path):
    """No kill of a process shows what a power cut does; so ask SQLite: 2 is FULL, 1 NORMAL."""
    for level, number in (("FULL", 2), ("NORMAL", 1)):
        store = SiteStore(tmp_path / "site.db", level)
        assert store._db.execute("PRAGMA synchronous").fetchone() == (number,)
        assert store._db.execute("PRAGMA secure_delete").fetchone() == (1,)
    assert SiteStore(tmp_path / "x.db")._db.execute("PRAGMA synchronous").fetchone() == (2,)


# ----------------------------------------------------------------------------------------- races
NOW = dict(zip(STAGES, ("advertised", "shared", "masked", "signed", "revealed"), strict=True))


def _answer(fed: Any, name: str, stage: str, request: bytes) -> tuple[str, bytes]:
    """In a process of its own: what a client that has just been started says."""
    fed.restart_sites()
    try:
        return "", fed.answer(name, stage, request)
    except WireError as error:
        return type(error).__name__, b""


def _in_children(*actions: Callable[[], Any]) -> list[Any]:
    """What several processes find that begin at the same time; None for one that died."""
    go, start = os.pipe()
    pipes, pids = [], []
    for action in actions:
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(start)
            os.read(go, 1)  # until the parent lets all go at once
            try:
                os.write(theirs, pickle.dumps(action()))
            finally:
                os._exit(0)
        os.close(theirs)
        pipes.append(ours)
        pids.append(pid)
    os.close(go)
    os.close(start)
    found = []
    for pipe, pid in zip(pipes, pids, strict=True):
        with os.fdopen(pipe, "rb") as file:
            data = file.read()
        os.waitpid(pid, 0)
        found.append(pickle.loads(data) if data else None)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_of_two_processes_with_one_request_one_answers(masked_federation, stage):
    for trial in range(3):
        fed = masked_federation(base=CLIENT_UNIT, sizes=FOUR, folder=f"{trial}")
        opened, exchange = fed.open_until(stage)
        request = exchange.requests["client-0"]
        fed.stop_sites()
        told = _in_children(*[lambda fed=fed, r=request: _answer(fed, "client-0", stage, r)] * 3)
        fed.restart_sites()
        answers = {reply for error, reply in told if not error}
        refused = [error for error, _ in told if error]
        assert len(answers) == 1
        assert set(refused) <= {"ProtocolViolation"}
        assert fed.charged("client-0") == (STAGES.index(stage) >= 2)
        # And the one answer is one that the round goes on with.
        opened.receive("client-0", answers.pop())
        for name in fed.names[1:]:
            opened.receive(name, fed.answer(name, stage, exchange.requests[name]))
        assert fed.finish(opened, opened.proceed()).clients == tuple(fed.names)


# ----------------------------------------------------------------------------- kills of a client
def _kill_before(statement: int, database: sqlite3.Connection) -> None:
    """End this process by SIGKILL when SQLite starts its n-th statement from now."""
    seen = 0

    def trace(_sql: str) -> None:
        nonlocal seen
        seen += 1
        if seen == statement:
            os.kill(os.getpid(), signal.SIGKILL)

    database.set_trace_callback(trace)


@pytest.mark.parametrize("stage", STAGES)
def test_a_client_killed_at_any_statement_goes_on(masked_federation, stage):
    statement, died = 0, True
    while died:
        statement += 1
        fed = masked_federation(base=CLIENT_UNIT, sizes=FOUR, folder=f"{statement}")
        opened, exchange = fed.open_until(stage)
        request, before = exchange.requests["client-0"], fed.kept("client-0")
        fed.stop_sites()

        def doomed(fed: Any = fed, request: bytes = request, statement: int = statement) -> bytes:
            fed.restart_sites()
            _kill_before(statement, fed.machines["client-0"]._membership.store._db)
            answer: bytes = fed.answer("client-0", stage, request)
            return answer

        [said] = _in_children(doomed)
        died = said is None
        kept = fed.kept("client-0")
        fed.restart_sites()
        # Whole, or not at all: the stage and the charge belong together.
        done = kept != before
        assert fed.charged("client-0") == int(done if stage == "train" else stage in STAGES[3:])
        if not died:
            assert done
        fed.stop_sites()
        [(error, again)] = _in_children(
            lambda fed=fed, r=request: _answer(fed, "client-0", stage, r)
        )
        fed.restart_sites()
        # What it had kept may have been sent; it says that and nothing else.
        assert error == ""
        assert said in (None, again)
        if done:
            assert fed.kept("client-0") == kept
        for name in fed.names[1:]:
            opened.receive(name, fed.answer(name, stage, exchange.requests[name]))
        opened.receive("client-0", again)
        record = fed.finish(opened, opened.proceed())
        assert record.clients == tuple(fed.names)
        fed.close()
    assert statement > (4 if stage == "train" else 3)  # find, begin, write, commit


@pytest.mark.parametrize("stage", STAGES)
def test_an_answer_is_on_the_disk_before_it_is_sent(masked_federation, stage):
    """Killed with the answer in its hands: the store knows of it."""
    fed = masked_federation(base=CLIENT_UNIT, sizes=FOUR)
    _, exchange = fed.open_until(stage)
    request = exchange.requests["client-0"]
    fed.stop_sites()

    def doomed() -> None:
        fed.restart_sites()
        fed.answer("client-0", stage, request)
        os.kill(os.getpid(), signal.SIGKILL)

    assert _in_children(doomed) == [None]
    assert fed.kept("client-0").stage == NOW[stage]
    fed.restart_sites()
    assert fed.charged("client-0") == (STAGES.index(stage) >= 2)


def test_after_kills_the_next_attempt_is_charged_again(masked_federation):
    """Twice masked is twice charged, whoever knows of it: the ledger is never too small."""
    fed = masked_federation(base=CLIENT_UNIT, sizes=FOUR)
    for attempt in (1, 2, 3):
        fed.open_until("train", after=True)
        assert [fed.charged(name) for name in fed.names] == [attempt] * 4
        fed.restart_sites()
        fed.restart_server()
    fed.round()
    assert [fed.charged(name) for name in fed.names] == [4] * 4
    assert len(fed.journal.ledger().releases) == 1


# ----------------------------------------------------------------------------- kills of the server
def _record(number: int) -> RoundRecord:
    return RoundRecord(number, None, None, None, ("a",), {}, 1, 1, 0.1, 0.1)


def _journal(path: Path) -> Journal:
    state = GlobalState(np.arange(4, dtype=np.float32), {})
    return Journal.create(path, {"run_id": "r"}, state)


def _at_every_statement(
    tmp_path: Path, prepare: Callable[[Journal], None], act: Callable[[Journal], Any]
) -> list[tuple[bool, Path]]:
    """Kill `act` before each of its statements; whether it died, and its journal, for each."""
    found: list[tuple[bool, Path]] = []
    while not found or found[-1][0]:
        path = tmp_path / f"{len(found) + 1}.db"
        journal = _journal(path)
        prepare(journal)
        journal.close()

        def child(path: Path = path, statement: int = len(found) + 1) -> str:
            opened = Journal.open(path)
            _kill_before(statement, opened._db)
            act(opened)
            return "done"

        [said] = _in_children(child)
        found.append((said is None, path))
    return found


def test_a_seal_and_its_charge_are_there_together_or_not_at_all(tmp_path):
    kills = _at_every_statement(
        tmp_path, lambda j: j.next_attempt(1), lambda j: j.seal(1, b"sealed", RELEASE)
    )
    assert len(kills) > 4  # begin, update, insert, commit
    for died, path in kills:
        journal = Journal.open(path)
        assert journal.sealed(1) == (None if died else (1, b"sealed"))
        assert journal.ledger().releases == (() if died else (RELEASE,))
        assert journal.next_attempt(1) == 2
        journal.close()


def test_an_attempt_that_somebody_knows_of_is_not_given_again(tmp_path):
    def attempts(journal: Journal) -> None:
        for _ in range(3):
            number = journal.next_attempt(1)
            with journal._path.with_suffix(".told").open("a") as told:
                told.write(f"{number}\n")

    seen = set()
    for _, path in _at_every_statement(tmp_path, lambda j: None, attempts):
        told = path.with_suffix(".told")
        known = [int(line) for line in told.read_text().split()] if told.exists() else []
        journal = Journal.open(path)
        following = journal.next_attempt(1)
        assert known == list(range(1, len(known) + 1))
        assert following in (len(known) + 1, len(known) + 2)
        assert following not in known
        seen.add(len(known))
        journal.close()
    assert seen == {0, 1, 2, 3}


def test_a_commit_ends_the_open_round_or_leaves_it(tmp_path):
    def prepare(journal: Journal) -> None:
        journal.next_attempt(1)
        journal.seal(1, b"sealed", RELEASE)

    state = GlobalState(np.ones(4, np.float32), {})
    kills = _at_every_statement(tmp_path, prepare, lambda j: j.commit(_record(1), state))
    assert len(kills) > 5
    for died, path in kills:
        journal = Journal.open(path)
        assert journal.last_state()[0] == (0 if died else 1)
        assert journal.sealed(1) == ((1, b"sealed") if died else None)
        # Whatever happened to the round, its release has happened.
        assert journal.ledger().releases == (RELEASE,)
        journal.close()


def test_a_seal_is_of_its_round(tmp_path):
    journal = _journal(tmp_path / "j.db")
    journal.next_attempt(1)
    journal.next_attempt(1)
    assert journal.sealed(1) is None
    journal.seal(1, b"one", None)
    assert journal.sealed(1) == (2, b"one")
    assert journal.sealed(2) is None
    assert journal.ledger().releases == ()
    journal.commit(_record(1), GlobalState(np.ones(4, np.float32), {}))
    assert journal.sealed(1) is None
    assert journal.next_attempt(2) == 1
    assert journal.sealed(2) is None
    journal.close()


# --------------------------------------------------------------------------- budgets in parallel
def test_two_processes_cannot_both_take_what_is_left_of_a_budget(masked_federation):
    """In the clear: one asks while the other has looked and not yet entered."""
    fed = masked_federation("privacy.epsilon=25", base=RECORD_UNIT, sizes=(7,))
    site, local = fed.membership("client-0"), fed.machines["client-0"]._local
    charge = site.charge(local, "run", 1)
    taken = 0
    while site.store.ledger("client-0", "run").epsilon_with(charge.release, 1e-5) <= 25:
        site.store.charge("client-0", "run", charge)
        taken += 1
    assert taken > 1
    again = masked_federation(
        "privacy.epsilon=25", "seed=1", base=RECORD_UNIT, sizes=(7,), run_id="new"
    )
    local = again.machines["client-0"]._local
    rivals = [fed.sites._path, again.sites._path]
    assert rivals[0] == rivals[1]
    one = replace(site, store=SiteStore(rivals[0]))
    other = replace(site, store=SiteStore(rivals[1]))

    def take(site: Any) -> None:
        site.store.charge("client-0", "new", site.charge(local, "new", 1))

    for _ in range(taken - 1):
        take(one)
    entered: list[str] = []

    def trace(statement: str) -> None:
        if statement.startswith("BEGIN") and not entered:
            entered.append(statement)
            take(other)

    one.store._db.set_trace_callback(trace)
    with pytest.raises(BudgetExceeded):
        take(one)
    assert len(site.store.ledger("client-0", "new").releases) == taken


def test_masked_values_of_one_round_are_charged_before_they_leave(masked_federation):
    fed = masked_federation(base=CLIENT_UNIT, sizes=FOUR)
    opened, exchange = fed.open_until("train")
    for name, request in exchange.requests.items():
        assert fed.charged(name) == 0
        reply = fed.answer(name, "train", request)
        assert fed.charged(name) == 1
        opened.receive(name, reply)
    assert len(fed.journal.ledger().releases) == 0
    following = opened.proceed()
    assert len(fed.journal.ledger().releases) == 1
    fed.finish(opened, following)
    assert MASKED[0] in CLIENT_UNIT
