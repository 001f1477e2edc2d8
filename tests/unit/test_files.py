"""Files are whole or not there."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from fedtune.files import transaction, write_atomic, write_json


def test_new_content_replaces_old_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for data in (b"one", b"", b"three" * 1000):
        write_atomic(path, data)
        assert path.read_bytes() == data
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace"])
def test_a_failure_leaves_the_old_file(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bin"
    write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(call, fail)
        with pytest.raises(OSError, match="disk full"):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_json_is_readable_utf8_without_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"name": "Zürich", "values": [1, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "Zürich", "values": [1, None]}
    assert "Zürich" in path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": float("nan")})
    assert "Zürich" in path.read_text(encoding="utf-8")


def test_a_commit_that_fails_is_rolled_back_and_the_next_one_succeeds(tmp_path: Path) -> None:
    """A deferred foreign key is checked in the commit, after the block has ended well."""
    with closing(sqlite3.connect(tmp_path / "db", isolation_level=None)) as database:
        database.execute("PRAGMA foreign_keys = ON")
        database.execute("CREATE TABLE one (a INTEGER PRIMARY KEY)")
        database.execute("CREATE TABLE two (b REFERENCES one (a) DEFERRABLE INITIALLY DEFERRED)")
        with pytest.raises(sqlite3.IntegrityError), transaction(database) as db:
            db.execute("INSERT INTO two VALUES (1)")
        with transaction(database) as db:
            db.execute("INSERT INTO one VALUES (1)")
            db.execute("INSERT INTO two VALUES (1)")
        assert database.execute("SELECT b FROM two").fetchall() == [(1,)]


def test_what_sqlite_has_rolled_back_itself_is_told_as_it_was(tmp_path: Path) -> None:
    """As it does on some errors of the disk."""
    with closing(sqlite3.connect(tmp_path / "db", isolation_level=None)) as database:
        database.execute("CREATE TABLE one (a UNIQUE)")
        database.execute("INSERT INTO one VALUES (1)")
        with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"), transaction(database) as db:
            db.executemany("INSERT OR ROLLBACK INTO one VALUES (?)", [(2,), (1,)])
        assert database.execute("SELECT a FROM one").fetchall() == [(1,)]
