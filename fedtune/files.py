"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp-"  # begins the names of files that are not yet whole


def write_atomic(path: Path, data: bytes) -> None:
    """Put `data` at `path`; whoever reads `path`, even after a crash, sees all of old or new.

    The folder must exist. Raises `OSError`; the old file then is untouched.
    """
    # In the same folder, because a rename is only atomic within one file system. Opened like any
    # file (mkstemp would make it private): the umask decides who may read it.
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            # Before the rename: otherwise a power cut can leave the new name on an empty file.
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_private(path: Path, data: bytes) -> None:
    """Make the file `path`, for its owner alone from the first byte; `OSError` if it exists."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """All of the block's statements or none; other processes wait. For autocommit connections."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield database
        database.execute("COMMIT")
    except BaseException:
        # On a full disk SQLite may have rolled back by itself, or fail in the commit.
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


def write_json(path: Path, obj: object) -> None:
    """Put `obj` at `path` as indented UTF-8 JSON, atomically.

    Raises `ValueError` for NaN and infinities, which JSON does not have.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Make new names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
