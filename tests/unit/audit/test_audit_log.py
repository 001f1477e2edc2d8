"""An audit log on a real disk: begun, gone on with, torn, locked, full, killed in the middle."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import resource
import runpy
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtune.audit.entry import Entry, Event, Head, genesis
from fedtune.audit.log import AuditLog
from fedtune.audit.verify import verify_log
from fedtune.errors import AuditLogError, AuditWriteError, BrokenAuditLog, ConfigError
from fedtune.secagg.keys import Identity

VECTORS = Path(__file__).resolve().parents[2] / "vectors"
IDENTITY = Identity("clinic-1", bytes(range(32)))
OTHER = Identity("clinic-1", bytes(range(1, 33)))
Forked = Callable[[Callable[[], None]], int]


def key_of(_writer: str) -> bytes:
    return IDENTITY.public_key


def written(path: Path, entries: int) -> bytes:
    """A log of so many entries; its bytes."""
    with AuditLog(path, IDENTITY) as log:
        for number in range(2, entries + 1):
            log.append(Event.CLIENT_JOINED, {"client": f"clinic-{number}"})
    return path.read_bytes()


def entries_of(path: Path) -> list[Entry]:
    return [Entry.read(line) for line in path.read_bytes().splitlines()]


def test_entries_are_byte_for_byte_those_of_another_implementation(tmp_path: Path) -> None:
    """By tests/vectors/make_audit_v1.py, which shares no code with fedtune."""
    document = json.loads((VECTORS / "audit_v1.json").read_text())
    assert runpy.run_path(str(VECTORS / "make_audit_v1.py"))["document"]() == document
    for vector in document:
        identity = Identity(vector["writer"], bytes.fromhex(vector["private_key"]))
        previous = genesis(identity.name, identity.public_key)
        for line in vector["lines"]:
            found = Entry.read(line.encode())
            made = Entry.signed_by(
                identity, found.number, found.time, found.event, found.details, previous
            )
            assert made.line() == line.encode()
            previous = hashlib.sha256(line.encode()).hexdigest()
        path = tmp_path / f"{len(vector['lines'])}.jsonl"
        path.write_text("".join(f"{line}\n" for line in vector["lines"]))
        key = bytes.fromhex(vector["public_key"])
        findings = verify_log(path, lambda _, key=key: key)
        assert str(findings.head) == vector["head"]
        assert findings.writer == vector["writer"]


def test_a_log_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    before = datetime.datetime.now(datetime.UTC)
    with AuditLog(path, IDENTITY) as log:
        log.append(Event.CLIENT_JOINED, {"client": "Zürich\n\x1b[31m", "share": 0.1, "all": ("a",)})
        head = log.head
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with AuditLog(path, IDENTITY) as log:
        assert log.head == head
        log.append(Event.CLIENT_LEFT, {})
        head = log.head
    assert path.read_bytes().isascii()
    lines = path.read_bytes().splitlines()
    assert str(head) == f"3:{hashlib.sha256(lines[-1]).hexdigest()}"
    begun, joined, left = entries_of(path)
    assert begun.details == {"writer": "clinic-1", "public-key": IDENTITY.public_key.hex()}
    assert joined.details == {"client": "Zürich\n\x1b[31m", "share": 0.1, "all": ("a",)}
    assert [begun.number, joined.number, left.number] == [1, 2, 3]
    found = verify_log(path, key_of)
    assert (found.head, found.writer, found.notes) == (head, "clinic-1", [])
    assert found.events == {"log-begun": 1, "client-joined": 1, "client-left": 1}
    times = [datetime.datetime.fromisoformat(text) for text in (found.first, found.last)]
    assert before <= times[0] <= times[1] <= datetime.datetime.now(datetime.UTC)


def test_each_entry_is_on_the_disk_before_anything_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync is called after each line, for that file, when all of the line is in it."""
    path, synced = tmp_path / "audit.jsonl", []
    fsync = os.fsync

    def watched(handle: int) -> None:
        fsync(handle)
        status = os.fstat(handle)
        synced.append((stat.S_ISDIR(status.st_mode), status.st_size))

    monkeypatch.setattr(os, "fsync", watched)
    with AuditLog(path, IDENTITY) as log:
        first = path.stat().st_size
        log.append(Event.CLIENT_LEFT, {})
    # The new name in its folder, then each line.
    assert [size for folder, size in synced if not folder] == [first, path.stat().st_size]
    assert [folder for folder, _ in synced] == [True, False, False]


@pytest.mark.parametrize("entries", [1, 2, 3])
def test_a_torn_last_line_is_cut_off_wherever_it_was_torn(tmp_path: Path, entries: int) -> None:
    path = tmp_path / "audit.jsonl"
    whole = written(path, entries)
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(start + 1, len(whole), 11):
        path.write_bytes(whole[:end])
        with pytest.raises(BrokenAuditLog, match="does not end"):
            verify_log(path, key_of)
        with AuditLog(path, IDENTITY) as log:
            log.append(Event.CLIENT_LEFT, {})
        found = entries_of(path)
        events = [entry.event for entry in found[-2:]]
        assert events == [Event.TORN_LINE_REMOVED, Event.CLIENT_LEFT]
        digest = hashlib.sha256(whole[start:end]).hexdigest()
        assert found[-2].details == {"bytes": end - start, "sha256": digest}
        assert verify_log(path, key_of).head.number == max(entries - 1, 1) + 2
        assert path.read_bytes().startswith(whole[:start])


def test_an_empty_file_is_a_log_that_was_not_begun(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.touch()
    with pytest.raises(BrokenAuditLog) as broken:
        verify_log(path, key_of)
    assert broken.value.line == 1
    AuditLog(path, IDENTITY).close()
    assert verify_log(path, key_of).events == {"log-begun": 1}


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [*lines[:-1], lines[-1].replace(b"clinic-4", b"clinic-5")],
        lambda lines: [*lines[:-2], lines[-1]],
        lambda lines: [*lines[:-1], lines[-2]],
        lambda lines: [*lines, b""],
        lambda lines: [*lines, b"{}"],
        lambda lines: [*lines, b"[" * 100_000],
        lambda lines: [b"\0" * 100],
        lambda lines: [*lines[:-1], b'{"number":1e999' + lines[-1][11:]],
        lambda lines: [b"x" * (9 << 20)],
    ],
)
def test_a_log_whose_end_does_not_verify_is_left_as_it_is(
    tmp_path: Path, change: Callable[[list[bytes]], list[bytes]]
) -> None:
    path = tmp_path / "audit.jsonl"
    lines = change(written(path, 4).splitlines())
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    before = path.read_bytes()
    with pytest.raises(AuditLogError):
        AuditLog(path, IDENTITY)
    assert path.read_bytes() == before
    with pytest.raises(BrokenAuditLog):
        verify_log(path, key_of)


def test_nobody_goes_on_with_the_log_of_another(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    before = written(path, 3)
    for identity in (OTHER, Identity("clinic-2", IDENTITY.private_key)):
        path.write_bytes(before if identity is OTHER else before.splitlines()[0] + b"\n")
        with pytest.raises(AuditLogError, match="not as this writer wrote it"):
            AuditLog(path, identity)


@pytest.mark.parametrize("place", ["a folder", "missing/audit.jsonl", "a file/audit.jsonl"])
def test_a_log_that_cannot_be_opened_says_why(tmp_path: Path, place: str) -> None:
    (tmp_path / "a folder").mkdir()
    (tmp_path / "a file").touch()
    with pytest.raises(AuditLogError, match="cannot be opened"):
        AuditLog(tmp_path / place, IDENTITY)
    with pytest.raises(ConfigError, match="cannot be read"):
        verify_log(tmp_path / "not there", key_of)


def test_a_second_process_is_refused_until_the_first_has_ended(
    tmp_path: Path, forked: Forked
) -> None:
    path = tmp_path / "audit.jsonl"

    def refused() -> None:
        with pytest.raises(AuditLogError, match="in use by another process"):
            AuditLog(path, IDENTITY)

    with AuditLog(path, IDENTITY):
        assert forked(refused) == 0
        refused()
    assert forked(lambda: AuditLog(path, IDENTITY).append(Event.CLIENT_LEFT, {})) == 0
    assert len(entries_of(path)) == 2


def test_a_full_disk_stops_the_writer_and_the_next_one_goes_on(
    tmp_path: Path, forked: Forked
) -> None:
    """A real short write: the limit on the size of files cuts a line in the middle."""
    path = tmp_path / "audit.jsonl"
    size = len(written(path, 3))

    def fill() -> None:
        log = AuditLog(path, IDENTITY)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, size + 100))
        for _ in range(2):
            with pytest.raises(AuditWriteError, match="cannot be written"):
                log.append(Event.CLIENT_LEFT, {})
        assert log.closed

    assert forked(fill) == 0
    assert path.stat().st_size == size + 100
    with AuditLog(path, IDENTITY) as log:
        assert log.head.number == 4
    assert entries_of(path)[-1].details["bytes"] == 100


@pytest.mark.parametrize("change", ["removed", "replaced", "cut", "longer"])
def test_whoever_changes_a_log_that_is_open_stops_its_writer(tmp_path: Path, change: str) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, IDENTITY)
    if change in ("removed", "replaced"):
        path.unlink()
    if change in ("replaced", "longer"):
        with path.open("ab") as file:
            file.write(b"x")
    if change == "cut":
        os.truncate(path, 10)
    with pytest.raises(AuditWriteError, match="somebody else has changed or removed it"):
        log.append(Event.CLIENT_LEFT, {})


def test_an_entry_is_bounded_and_has_plain_values(tmp_path: Path) -> None:
    with AuditLog(tmp_path / "audit.jsonl", IDENTITY) as log:
        with pytest.raises(AuditWriteError, match="too large"):
            log.append(Event.CLIENT_LEFT, {"client": "x" * (4 << 20)})
        for value in (float("nan"), float("inf"), None, {}, ("a", 1), b"x"):
            with pytest.raises(ValueError, match="its detail odd"):
                log.append(Event.CLIENT_LEFT, {"odd": value})  # type: ignore[dict-item]
        log.append(Event.CLIENT_LEFT, {"client": "x" * (1 << 20)})
    AuditLog(tmp_path / "audit.jsonl", IDENTITY).close()
    assert verify_log(tmp_path / "audit.jsonl", key_of).head.number == 2


def test_what_was_acknowledged_survives_a_kill_at_any_moment(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    written(path, 1)
    for turn in range(12):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            log = AuditLog(path, IDENTITY)
            while True:
                log.append(Event.CLIENT_JOINED, {"client": "x" * 5000})
                os.write(writer, b"%d\n" % log.head.number)
        os.close(writer)
        with os.fdopen(reader, "rb") as told:
            told.readline()  # it is at it
            time.sleep(turn * 0.0007)  # a different moment each time; any of them is right
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            acknowledged = [int(line) for line in told.read().splitlines()]
        with AuditLog(path, IDENTITY) as log:
            assert log.head.number >= max(acknowledged, default=1)
        verify_log(path, key_of)


def test_opening_reads_the_end_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = tmp_path / "audit.jsonl", []
    written(path, 3)
    pread = os.pread

    def counted(handle: int, size: int, offset: int) -> bytes:
        data = pread(handle, size, offset)
        read.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", counted)
    sizes = []
    with AuditLog(path, IDENTITY) as log:
        for _ in range(300):
            log.append(Event.CLIENT_JOINED, {"client": "x" * 800})
    for _ in range(2):
        read.clear()
        AuditLog(path, IDENTITY).close()
        sizes.append(sum(read))
    assert path.stat().st_size > 300_000
    assert max(sizes) <= 64 << 10
    # From the end backwards it is all there, also across the blocks that are read.
    with AuditLog(path, IDENTITY) as log:
        found = list(log.entries_backwards())
    assert [entry.number for entry in found] == list(range(303, 0, -1))


def test_a_head_that_was_told_finds_a_log_cut_off_or_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    whole = written(path, 5)
    lines = whole.splitlines(keepends=True)
    heads = [
        Head(number, hashlib.sha256(line[:-1]).hexdigest()) for number, line in enumerate(lines, 1)
    ]
    for head in heads:
        assert verify_log(path, key_of, head).head == heads[-1]
        assert Head.parse(str(head)) == head
    path.write_bytes(b"".join(lines[:3]))
    assert verify_log(path, key_of).head == heads[2]  # the file alone does not show it
    with pytest.raises(BrokenAuditLog) as broken:
        verify_log(path, key_of, heads[4])
    assert broken.value.line == 4
    path.unlink()
    written(path, 5)
    with pytest.raises(BrokenAuditLog) as broken:
        verify_log(path, key_of, heads[2])
    assert broken.value.line == 3
    for text in ("3", "3:", "0:" + "a" * 64, "-1:" + "a" * 64, "3:" + "A" * 64, "x:" + "a" * 64):
        with pytest.raises(ValueError, match="no head of a log"):
            Head.parse(text)


def test_a_clock_that_is_set_back_is_a_note(tmp_path: Path) -> None:
    path, previous = tmp_path / "audit.jsonl", genesis("clinic-1", IDENTITY.public_key)
    details = {"writer": "clinic-1", "public-key": IDENTITY.public_key.hex()}
    for number, hour in enumerate((9, 8, 8, 10), 1):
        event = Event.LOG_BEGUN if number == 1 else Event.CLIENT_LEFT
        moment = f"2026-03-01T{hour:02}:00:00.000000Z"
        entry = Entry.signed_by(IDENTITY, number, moment, event, details, previous)
        previous = hashlib.sha256(entry.line()).hexdigest()
        with path.open("ab") as file:
            file.write(entry.line() + b"\n")
    [note] = verify_log(path, key_of).notes
    assert "before entry 2" in note
