"""The journal: real files, real processes, real kills."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedtune.errors import RunFolderError
from fedtune.records import RoundRecord
from fedtune.round import journal as journal_module
from fedtune.round.journal import Journal
from fedtune.round.server import GlobalState

IDENTITY = {"run_id": "r", "config_digest": "cc" * 32}
SIZE = 2000
Forked = Callable[[Callable[[], None]], int]


def _state(number: int) -> GlobalState:
    """The state after a round, told by its number."""
    adapter = np.random.default_rng(number).normal(size=SIZE).astype(np.float32)
    return GlobalState(adapter, {"velocity": np.arange(3.0) + number / 3})


def _record(number: int, accuracy: float | None = None) -> RoundRecord:
    return RoundRecord(
        round=number,
        train_loss=0.1 * number,
        loss=None,
        accuracy=accuracy,
        clients=("a", "b"),
        failed={"c": "no answer"},
        bytes_up=number,
        bytes_down=2 * number,
        seconds=0.25,
        train_seconds=0.5,
    )


def _create(path: Path, rounds: int = 0) -> Journal:
    journal = Journal.create(path, IDENTITY, _state(0))
    for number in range(1, rounds + 1):
        journal.commit(_record(number), _state(number))
    return journal


def _same(state: GlobalState, number: int) -> bool:
    expected = _state(number)
    return (
        state.adapter.tobytes() == expected.adapter.tobytes()
        and state.adapter.dtype == np.float32
        and state.rule_state.keys() == expected.rule_state.keys()
        and state.rule_state["velocity"].tobytes() == expected.rule_state["velocity"].tobytes()
    )


def test_what_is_committed_is_there_after_opening_again(tmp_path):
    path = tmp_path / "journal.sqlite"
    _create(path, 3).close()
    journal = Journal.open(path)
    number, state = journal.last_state()
    assert number == 3
    assert _same(state, 3)
    assert journal.records() == [_record(1), _record(2), _record(3)]
    assert IDENTITY.items() <= journal.identity().items()
    journal.commit(_record(4), _state(4))
    assert _same(journal.last_state()[1], 4)
    journal.close()


def test_a_new_journal_is_at_round_0(tmp_path):
    journal = _create(tmp_path / "j.sqlite")
    number, state = journal.last_state()
    assert number == 0
    assert _same(state, 0)
    assert journal.records() == []
    journal.close()


def test_a_commit_is_on_the_disk_when_it_returns(tmp_path):
    # No kill of a process shows what a power cut does; so ask SQLite: 2 is FULL, 3 is EXTRA.
    journal = _create(tmp_path / "j.sqlite")
    assert journal._db.execute("PRAGMA synchronous").fetchone()[0] >= 2
    assert journal._db.execute("PRAGMA journal_mode").fetchone()[0] in ("delete", "wal")
    journal.close()


@pytest.mark.parametrize("number", [0, 1, 2, 4])
def test_a_round_follows_the_one_before(tmp_path, number):
    path = tmp_path / "j.sqlite"
    journal = _create(path, 2)
    with pytest.raises(ValueError, match=f"round {number}"):
        journal.commit(_record(number), _state(number))
    assert journal.records() == [_record(1), _record(2)]
    assert _same(journal.last_state()[1], 2)
    journal.commit(_record(3), _state(3))
    journal.close()


def test_a_round_that_cannot_be_written_leaves_nothing(tmp_path):
    journal = _create(tmp_path / "j.sqlite", 2)
    broken = GlobalState(_state(3).adapter, {"velocity": "text"})  # type: ignore[dict-item]
    with pytest.raises((AttributeError, TypeError, ValueError)):
        journal.commit(_record(3), broken)
    assert journal.last_state()[0] == 2
    assert _same(journal.last_state()[1], 2)
    journal.commit(_record(3), _state(3))
    journal.close()


def _adapters(path: Path) -> tuple[list[int], list[int]]:
    """Rounds whose adapter, and whose rule state, the file holds."""
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT round, adapter, rule_state FROM rounds ORDER BY round")
        table = rows.fetchall()
    return [r for r, a, _ in table if a is not None], [r for r, _, s in table if s is not None]


def test_only_the_first_the_best_and_the_last_adapter_are_kept(tmp_path):
    path = tmp_path / "j.sqlite"
    journal = _create(path)
    accuracies = [0.2, 0.6, None, 0.6, 0.5, 0.7, 0.1]
    expected = [[0, 1], [0, 2], [0, 2, 3], [0, 2, 4], [0, 2, 5], [0, 6], [0, 6, 7]]
    for number, (accuracy, kept) in enumerate(zip(accuracies, expected, strict=True), start=1):
        journal.commit(_record(number, accuracy), _state(number))
        assert _adapters(path) == (kept, [number])
    assert [record.accuracy for record in journal.records()] == accuracies
    journal.close()


def test_without_classes_the_adapter_of_the_least_loss_is_kept(tmp_path):
    path = tmp_path / "j.sqlite"
    journal = _create(path)
    losses = [4.0, 2.5, None, 3.0, 2.0, 2.2]
    expected = [[0, 1], [0, 2], [0, 2, 3], [0, 2, 4], [0, 5], [0, 5, 6]]
    for number, (loss, kept) in enumerate(zip(losses, expected, strict=True), start=1):
        journal.commit(replace(_record(number), loss=loss), _state(number))
        assert _adapters(path) == (kept, [number])
    journal.close()


def test_without_evaluations_the_first_and_the_last_are_kept(tmp_path):
    _create(tmp_path / "j.sqlite", 5).close()
    assert _adapters(tmp_path / "j.sqlite") == ([0, 5], [5])


def test_create_does_not_touch_what_is_there(tmp_path):
    path = tmp_path / "j.sqlite"
    _create(path, 2).close()
    with pytest.raises(RunFolderError, match="exists"):
        _create(path)
    journal = Journal.open(path)
    assert journal.last_state()[0] == 2
    journal.close()


@pytest.mark.parametrize(
    "content", [b"", b"not a database at all" * 100, b"SQLite format 3\0" + b"\0" * 5000]
)
def test_a_file_that_is_no_journal(tmp_path, content):
    path = tmp_path / "j.sqlite"
    path.write_bytes(content)
    with pytest.raises(RunFolderError, match="journal"):
        Journal.open(path)
    # The lock is free again: a whole journal can take the place.
    path.unlink()
    _create(path).close()


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RunFolderError, match="sqlite"):
        Journal.open(tmp_path / "j.sqlite")
    assert list(tmp_path.iterdir()) == []


def test_another_database_and_another_format(tmp_path):
    path = tmp_path / "j.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE something (x)")
    with pytest.raises(RunFolderError, match="journal"):
        Journal.open(path)
    path.unlink()
    _create(path).close()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE identity SET value = '99' WHERE key = 'format'")
    with pytest.raises(RunFolderError, match="format 99"):
        Journal.open(path)


def _refused(path: Path) -> None:
    """In a child: exit with 0 only if the journal is refused because it is in use."""
    try:
        Journal.open(path)
    except RunFolderError as error:
        if "in use" in str(error):
            return
    os._exit(9)


def _accepted(path: Path) -> None:
    Journal.open(path).close()


def test_one_process_at_a_time(tmp_path, forked: Forked):
    path = tmp_path / "j.sqlite"
    journal = _create(path)
    assert forked(lambda: _refused(path)) == 0
    journal.commit(_record(1), _state(1))  # the attempt did not disturb the holder
    assert forked(lambda: _refused(path)) == 0
    journal.close()
    assert forked(lambda: _accepted(path)) == 0
    journal = Journal.open(path)
    assert forked(lambda: _refused(path)) == 0
    journal.close()


def test_a_worker_forked_from_the_holder_does_not_hold_it(tmp_path, forked: Forked):
    path = tmp_path / "j.sqlite"
    journal = _create(path)
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(theirs)
        os.read(ours, 1)  # until the parent is done
        os._exit(0)
    os.close(ours)
    try:
        journal.close()
        assert forked(lambda: _accepted(path)) == 0
    finally:
        os.close(theirs)
        os.waitpid(pid, 0)


def test_a_killed_holder_lets_go(tmp_path):
    path = tmp_path / "j.sqlite"
    _create(path).close()
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        Journal.open(path)
        os.write(theirs, b"x")
        while True:
            signal.pause()
    assert os.read(ours, 1) == b"x"
    with pytest.raises(RunFolderError, match="in use"):
        Journal.open(path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    Journal.open(path).close()
    os.close(ours)
    os.close(theirs)


_WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_journal import Journal, _create, _record, _state
path = Path(sys.argv[2])
journal = _create(path)
for number in range(1, 100_000):
    journal.commit(_record(number, number % 7 / 10), _state(number))
    print(number, flush=True)
"""


@pytest.mark.parametrize("after", [1, 4, 17, 60])
def test_a_kill_at_any_moment_leaves_whole_rounds(tmp_path, child_environment, after):
    path = tmp_path / "j.sqlite"
    arguments = [sys.executable, "-c", _WRITER, str(Path(__file__).parent), str(path)]
    with subprocess.Popen(arguments, env=child_environment, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) == after:
                break
        writer.kill()
        told = after + len(writer.stdout.read().splitlines())
    journal = Journal.open(path)
    last, state = journal.last_state()
    assert last in (told, told + 1)  # killed after the commit and before the line was printed
    assert _same(state, last)
    assert [record.round for record in journal.records()] == list(range(1, last + 1))
    journal.commit(_record(last + 1), _state(last + 1))
    journal.close()


def _kill_at(statement: int) -> Callable[[sqlite3.Connection], None]:
    """End this process by SIGKILL when SQLite starts its n-th statement from now."""
    seen = 0

    def trace(_sql: str) -> None:
        nonlocal seen
        seen += 1
        if seen == statement:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda connection: connection.set_trace_callback(trace)


def test_a_kill_at_any_statement_of_a_commit_is_before_or_after_the_round(tmp_path, forked: Forked):
    statement, died = 0, True
    while died:
        statement += 1
        path = tmp_path / f"{statement}.sqlite"
        _create(path, 2).close()

        def commit(path: Path = path, statement: int = statement) -> None:
            journal = Journal.open(path)
            _kill_at(statement)(journal._db)
            journal.commit(_record(3), _state(3))

        died = os.WIFSIGNALED(forked(commit))
        journal = Journal.open(path)
        last, state = journal.last_state()
        assert last == (2 if died else 3)
        assert _same(state, last)
        assert len(journal.records()) == last
        journal.commit(_record(last + 1), _state(last + 1))
        journal.close()
    assert statement > 5  # begin, look, insert, two updates, commit


def test_a_kill_at_any_statement_of_create_leaves_no_journal_or_a_whole_one(
    tmp_path, forked: Forked
):
    statement, died = 0, True
    while died:
        statement += 1
        path = tmp_path / f"{statement}.sqlite"

        def create(path: Path = path, statement: int = statement) -> None:
            connect = journal_module._connect

            def traced(where: Path) -> sqlite3.Connection:
                connection = connect(where)
                _kill_at(statement)(connection)
                return connection

            journal_module._connect = traced
            _create(path)

        died = os.WIFSIGNALED(forked(create))
        try:
            journal = Journal.open(path)
        except RunFolderError:
            assert died
            continue
        number, state = journal.last_state()
        assert number == 0
        assert _same(state, 0)
        journal.close()
    assert statement > 3
