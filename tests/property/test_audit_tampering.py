"""Whatever is done to a log by somebody without its writer's key is found, at the right line."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.audit.entry import Entry, Event, digest_of_line
from fedtune.audit.log import AuditLog
from fedtune.audit.verify import verify_log
from fedtune.errors import BrokenAuditLog
from fedtune.secagg.keys import Identity

WRITER = Identity("clinic-1", bytes(32))
FORGER = Identity("clinic-1", bytes([1] * 32))
ENTRIES = 6
places = st.integers(0, ENTRIES - 1)
names = st.sampled_from(["", "a", "Zürich", "\n", "😀"])


@contextmanager
def log_file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "audit.jsonl"


@lru_cache
def lines() -> tuple[bytes, ...]:
    """A log's lines; those in the middle are alike but for their places."""
    with log_file() as path:
        with AuditLog(path, WRITER) as log:
            for _ in range(ENTRIES - 1):
                log.append(Event.ROUND_COMMITTED, {"counted": ("a", "b"), "epsilon": 0.25})
        return tuple(path.read_bytes().splitlines())


def first_bad(content: bytes) -> int | None:
    """Number of the first line that is found to be wrong."""
    with log_file() as path:
        path.write_bytes(content)
        try:
            verify_log(path, lambda _: WRITER.public_key)
        except BrokenAuditLog as error:
            return error.line
    return None


def joined(changed: list[bytes] | tuple[bytes, ...]) -> bytes:
    return b"".join(line + b"\n" for line in changed)


def test_the_log_as_it_was_written_is_sound() -> None:
    assert first_bad(joined(lines())) is None


@given(places, st.data())
def test_a_changed_byte(place: int, data: st.DataObject) -> None:
    content = bytearray(joined(lines()))
    start = len(joined(lines()[:place]))
    offset = start + data.draw(st.integers(0, len(lines()[place])))
    content[offset] ^= data.draw(st.integers(1, 255))
    assert first_bad(bytes(content)) == place + 1


@given(places, st.data())
def test_an_inserted_or_a_missing_byte(place: int, data: st.DataObject) -> None:
    content = joined(lines())
    offset = len(joined(lines()[:place])) + data.draw(st.integers(0, len(lines()[place]) - 1))
    more = content[:offset] + data.draw(st.binary(min_size=1, max_size=2)) + content[offset:]
    less = content[:offset] + content[offset + 1 :]
    for changed in (more, less):
        # Two bytes that are alike side by side: taking one away, or adding a third, is the same.
        assert first_bad(changed) == place + 1


@given(places)
def test_a_missing_line(place: int) -> None:
    changed = [line for number, line in enumerate(lines()) if number != place]
    # Without its last line a log looks whole: that takes a head that was told before.
    assert first_bad(joined(changed)) == (place + 1 if place < ENTRIES - 1 else None)


@given(places, places)
def test_a_line_that_is_there_twice(place: int, target: int) -> None:
    changed = list(lines())
    changed.insert(target + 1, lines()[place])
    # A line put before itself stands where it stood, and then once more.
    assert first_bad(joined(changed)) == target + (3 if place == target + 1 else 2)


@given(places, places)
def test_lines_in_another_order(one: int, other: int) -> None:
    changed = list(lines())
    changed[one], changed[other] = changed[other], changed[one]
    assert first_bad(joined(changed)) == (min(one, other) + 1 if one != other else None)


@given(places, names, st.booleans())
def test_a_line_that_another_has_signed(place: int, name: str, resigned: bool) -> None:
    """Also if all that follows is signed anew, so that the chain holds."""
    changed = list(lines())
    previous = Entry.read(changed[place]).previous
    for number in range(place, ENTRIES if resigned else place + 1):
        old = Entry.read(changed[number])
        details = dict(old.details)
        if number == place and place:
            details["counted"] = (name,)
        entry = Entry.signed_by(FORGER, old.number, old.time, old.event, details, previous)
        changed[number] = entry.line()
        previous = digest_of_line(changed[number])
    assert first_bad(joined(changed)) == place + 1


@given(places)
def test_a_line_of_another_log_of_the_same_writer(place: int) -> None:
    """Its number and its signature are right: only the chain tells."""
    with log_file() as path:
        with AuditLog(path, WRITER) as log:
            for _ in range(ENTRIES - 1):
                log.append(Event.ROUND_COMMITTED, {"counted": ()})
        others = path.read_bytes().splitlines()
    changed = list(lines())
    changed[place] = others[place]
    # Another beginning is as good by itself, and nothing follows it.
    assert first_bad(joined(changed)) == max(place + 1, 2)


@given(places)
def test_numbers_with_a_gap(place: int) -> None:
    """Signed and chained by the writer itself: numbers say how many entries there are."""
    changed, previous = list(lines()), ""
    for number, line in enumerate(lines()):
        old = Entry.read(line)
        entry = Entry.signed_by(
            WRITER,
            old.number + (number >= place),
            old.time,
            old.event,
            old.details,
            previous or old.previous,
        )
        changed[number] = entry.line()
        previous = digest_of_line(changed[number])
    assert first_bad(joined(changed)) == place + 1


@given(places, st.sampled_from(["number", "time", "event", "counted", "epsilon"]))
def test_a_changed_value_in_the_right_spelling(place: int, what: str) -> None:
    old = Entry.read(lines()[place])
    new = {
        "number": Entry(old.number + 1, *_rest(old)),
        "time": Entry(old.number, "2020-01-01T00:00:00.000000Z", *_rest(old)[1:]),
        "event": Entry(old.number, old.time, Event.ROUND_LOST, *_rest(old)[2:]),
        "counted": _with(old, "counted", ("a",)),
        "epsilon": _with(old, "epsilon", 0.5),
    }[what]
    changed = list(lines())
    changed[place] = new.line()
    assert changed[place] != lines()[place]
    assert first_bad(joined(changed)) == place + 1


def _rest(entry: Entry) -> tuple[str, Event, dict[str, object], str, str]:
    return entry.time, entry.event, dict(entry.details), entry.previous, entry.signature


def _with(entry: Entry, name: str, value: object) -> Entry:
    details = {**entry.details, name: value}
    return Entry(entry.number, entry.time, entry.event, details, entry.previous, entry.signature)


@given(st.binary(max_size=300))
def test_anything_else_is_no_log(content: bytes) -> None:
    assert first_bad(content) == 1


@pytest.mark.parametrize(
    "spell",
    [
        lambda line: line.replace(b":", b": ", 1),
        lambda line: line.replace(b"{", b'{"number":9,', 1),
        lambda line: line.replace(b'"details":{', b'"details":{"counted":["c"],', 1),
        lambda line: line.replace(b"0.25", b"2.5e-1"),
        lambda line: line.replace(b'"a"', b'"\\u0061"'),
        lambda line: line + b" ",
        lambda line: line + b"\r",
        lambda line: line[:-1] + b',"more":1}',
        lambda line: line.replace(b'"signature":"', b'"signature":"00'),
        lambda line: line[:-66] + line[-66:].upper(),
    ],
)
def test_another_spelling_of_the_same_entry(spell: object) -> None:
    changed = list(lines())
    changed[2] = spell(changed[2])  # type: ignore[operator]
    assert first_bad(joined(changed)) == 3
