"""What `fedtune audit` prints."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedtune.audit.compare import compare_logs
from fedtune.audit.entry import Entry, Head
from fedtune.audit.verify import Findings, KeyOf, read_log, verify_log
from fedtune.deploy.keys import read_roster
from fedtune.errors import BrokenAuditLog, ConfigError
from fedtune.report.words import count, printable
from fedtune.secagg.keys import KEY_BYTES, SERVER


def verify(
    file: Path,
    roster: Path | None,
    public_key: str | None,
    name: str | None,
    head: str | None,
    as_json: bool,
) -> int:
    """Verify a whole log; returns 0 if it is sound, 1 if it is not what its writer wrote."""
    key_of, wanted = _trusted(roster, public_key, name), _head(head)
    try:
        found = verify_log(file, key_of, wanted)
    except BrokenAuditLog as error:
        if as_json:
            print(json.dumps({"sound": False, "line": error.line, "reason": error.reason}))
        print(f"fedtune: {file}: {printable(str(error))}", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps(_json(found)))
    else:
        _show(found)
    return 0


def compare(server: Path, site: Path, roster: Path, as_json: bool) -> int:
    """Compare what two logs say of the same rounds; returns 0 if they agree, 1 if not."""
    logs: dict[str, list[Entry]] = {}
    for file in (server, site):
        try:
            entries = [entry for entry, _ in read_log(file, _trusted(roster, None, None))]
        except BrokenAuditLog as error:
            print(f"fedtune: {file}: {printable(str(error))}", file=sys.stderr)
            return 1
        logs[str(entries[0].details["writer"])] = entries
    names = tuple(logs)
    if len(names) != 2 or names[0] != SERVER:
        raise ConfigError(f"{server}, {site}: first the server's log, then a site's")
    name = names[1]
    found = compare_logs(logs[SERVER], logs[name], name)
    if not found.run:
        raise ConfigError(f"{server}: the server has not started a run yet")
    if as_json:
        print(json.dumps({"agree": not found.differences, "site": name, **asdict(found)}))
        return 1 if found.differences else 0
    for difference in found.differences:
        print(printable(difference))
    words = "contradict each other" if found.differences else "agree"
    print(
        f"the server and {printable(name)} {words}: run {printable(found.run)}, "
        f"rounds: {count(len(found.rounds))}, counted in: {count(len(found.counted))}"
    )
    if found.not_counted:
        rounds = ", ".join(map(str, found.not_counted))
        print(f"note: it has answered in rounds whose sum it is not in: {rounds}")
    return 1 if found.differences else 0


def _trusted(roster: Path | None, public_key: str | None, name: str | None) -> KeyOf:
    """The key of a writer, from where the log cannot change it."""
    if (roster is None) == (public_key is None):
        raise ConfigError(
            "say whose log it is: --roster or --public-key; a log that vouches for itself proves "
            "nothing"
        )
    keys = read_roster(roster).roster.keys if roster is not None else {}
    if roster is not None and name is not None and name not in keys:
        raise ConfigError(f"--name {name}: there is none in {roster}")
    given = _key(public_key) if public_key is not None else b""

    def key_of(writer: str) -> bytes:
        if name is not None and writer != name:
            raise ValueError(f"it begins the log of {_words(writer)}, not of {_words(name)}")
        if roster is not None and writer not in keys:
            raise ValueError(f"it begins the log of {_words(writer)}, who is not in the roster")
        return given or keys[writer]

    return key_of


def _key(text: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"--public-key: {2 * KEY_BYTES} hexadecimal digits, as in the roster")
    return key


def _head(text: str | None) -> Head | None:
    try:
        return Head.parse(text) if text is not None else None
    except ValueError as error:
        raise ConfigError(f"--head: {error}") from error


def _words(writer: str) -> str:
    return "the server" if writer == SERVER else writer


def _json(found: Findings) -> dict[str, object]:
    return {
        "sound": True,
        "writer": found.writer,
        "entries": found.head.number,
        "first": found.first,
        "last": found.last,
        "head": str(found.head),
        "events": dict(found.events),
        "notes": found.notes,
    }


def _show(found: Findings) -> None:
    writer = printable(_words(found.writer))
    print(f"sound, written by {writer}; entries: {count(found.head.number)}")
    print(f"from {found.first} to {found.last}")
    print(f"head {found.head}")
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for event, number in found.events.items():
        table.add_row(event, count(number))
    Console().print(table)
    for note in found.notes:
        print(f"note: {note}")
