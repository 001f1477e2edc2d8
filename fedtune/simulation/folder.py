"""The folder of a run: made whole, then added to one atomic write at a time."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Self

from fedtune.config import Config, load_config
from fedtune.errors import RunFolderError
from fedtune.files import TEMPORARY, write_atomic
from fedtune.records import RoundRecord
from fedtune.round.journal import Journal
from fedtune.round.server import GlobalState

CONFIG = "config.toml"
JOURNAL = "journal.db"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
REPORT = "report.html"
CONNECTOR = "connector.safetensors"  # in the adapter's folder, for a model of images
ADAPTER = "adapter"
TENSORBOARD = "tensorboard"
SITES = "sites.db"


class RunFolder:
    """`config.toml` and `journal.db` from the start; results as they come."""

    def __init__(self, path: Path, config: Config, journal: Journal) -> None:
        self.path = path
        self.config = config
        self.journal = journal

    @classmethod
    def create(
        cls, path: Path, config: Config, identity: dict[str, str], state: GlobalState
    ) -> Self:
        """A new run folder; raises `RunFolderError` if `path` exists.

        It is built under another name and renamed, so that it is never half there.
        """
        check_new(path)
        fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            fresh.mkdir(parents=True)
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be made: {error.strerror}") from error
        try:
            write_atomic(fresh / CONFIG, config.to_toml().encode())
            Journal.create(fresh / JOURNAL, identity, state).close()
            check_new(path)
            fresh.rename(path)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """An existing run folder; raises `RunFolderError` if it is none or is in use."""
        if not path.is_dir():
            raise RunFolderError(f"{path}: no such run folder")
        if not (path / CONFIG).is_file():
            raise RunFolderError(f"{path}: no {CONFIG}, so not the folder of a run")
        config = load_config(path / CONFIG)
        return cls(path, config, Journal.open(path / JOURNAL))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.journal.close()

    def rewrite_metrics(self) -> None:
        """Make `metrics.jsonl` say exactly what the journal says; sweep up after a kill."""
        for left_behind in self.path.glob(f"{TEMPORARY}*"):
            left_behind.unlink()
        lines = [_line(record) for record in self.journal.records()]
        write_atomic(self.path / METRICS, "".join(lines).encode())

    def append_metrics(self, record: RoundRecord) -> None:
        """Add a committed round to `metrics.jsonl` and flush it to the disk."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())


def check_new(path: Path) -> None:
    """Raise `RunFolderError` if there is anything at `path`."""
    if path.exists() or path.is_symlink():
        raise RunFolderError(
            f"{path} exists already; choose another --out, or continue it with --resume {path}"
        )


def free_path(parent: Path, name: str) -> Path:
    """`parent/name`, or with the first free number behind it."""
    path, number = parent / name, 1
    while path.exists():
        number += 1
        path = parent / f"{name}-{number}"
    return path


def _line(record: RoundRecord) -> str:
    return json.dumps(record.to_json(), ensure_ascii=False, allow_nan=False) + "\n"
