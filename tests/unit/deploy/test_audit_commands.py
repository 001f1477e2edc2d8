"""`fedtune audit`: whom it trusts, what it says, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.audit.entry import Event
from fedtune.audit.log import AuditLog
from fedtune.deploy.keys import PUBLIC, make_roster, make_server_keys, make_site_keys, read_identity
from fedtune.secagg.keys import SERVER

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """Run `fedtune audit`: exit code, stdout, stderr."""

    def run(*arguments: str | Path, command: str = "verify") -> tuple[int, str, str]:
        from fedtune.cli import main as run_command

        monkeypatch.setattr("sys.argv", ["fedtune", "audit", command, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_command()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A federation's keys and roster, the log of a site, and that of a stranger."""
    make_server_keys(tmp_path / "server", ["localhost"])
    for name in ("clinic-1", "clinic-2", "stranger"):
        make_site_keys(tmp_path / name, name)
        with AuditLog(tmp_path / f"{name}.jsonl", read_identity(tmp_path / name, name)) as log:
            for _ in range(3):
                log.append(Event.REQUEST_ANSWERED, {"round": 1})
    public = [tmp_path / name / PUBLIC for name in ("clinic-1", "clinic-2")]
    make_roster(tmp_path / "roster.toml", tmp_path / "server", public)
    return tmp_path


def test_a_sound_log(folder: Path, main: Main) -> None:
    log, roster = folder / "clinic-1.jsonl", folder / "roster.toml"
    code, out, err = main(log, "--roster", roster, "--name", "clinic-1")
    assert (code, err) == (0, "")
    assert "clinic-1; entries: 4" in out
    assert ["request-answered", "3"] in [line.split() for line in out.splitlines()]
    code, out, _ = main(log, "--roster", roster, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["events"] == {"log-begun": 1, "request-answered": 3}
    assert (found["sound"], found["writer"], found["entries"]) == (True, "clinic-1", 4)
    key = read_identity(folder / "clinic-1", "clinic-1").public_key.hex()
    code, out, _ = main(log, "--public-key", key, "--head", found["head"])
    assert (code, found["head"] in out) == (0, True)


def test_a_log_that_was_changed(folder: Path, main: Main) -> None:
    log, roster = folder / "clinic-1.jsonl", folder / "roster.toml"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:2], lines[2].replace(b"1}", b"2}"), *lines[3:]]))
    code, out, err = main(log, "--roster", roster)
    assert (code, out) == (1, "")
    assert f"{log}: line 3: its signature is not that of the log's writer" in err
    code, out, _ = main(log, "--roster", roster, "--json")
    assert code == 1
    assert (json.loads(out)["sound"], json.loads(out)["line"]) == (False, 3)
    log.write_bytes(b"".join(lines[:3]))
    assert main(log, "--roster", roster)[0] == 0
    code, _, err = main(log, "--roster", roster, "--head", f"4:{'0' * 64}")
    assert (code, "line 4: not there" in err) == (1, True)


def test_the_log_of_somebody_else(folder: Path, main: Main) -> None:
    roster, one, two = (folder / n for n in ("roster.toml", "clinic-1.jsonl", "clinic-2.jsonl"))
    assert main(two, "--roster", roster)[0] == 0
    for arguments, words in (
        ((two, "--roster", roster, "--name", "clinic-1"), "the log of clinic-2, not of clinic-1"),
        ((folder / "stranger.jsonl", "--roster", roster), "who is not in the roster"),
        ((one, "--public-key", "ab" * 32), "begun with another key"),
    ):
        code, _, err = main(*arguments)
        assert (code, words in err) == (1, True), err


def test_wrong_usage(folder: Path, main: Main) -> None:
    roster, log = folder / "roster.toml", folder / "clinic-1.jsonl"
    for arguments, words in (
        ((log,), "proves nothing"),
        ((log, "--roster", roster, "--public-key", "ab" * 32), "proves nothing"),
        ((log, "--public-key", "ab"), "64 hexadecimal digits"),
        ((log, "--public-key", "xy" * 32), "64 hexadecimal digits"),
        ((log, "--roster", roster, "--head", "4"), "no head of a log"),
        ((log, "--roster", roster, "--name", "clinic-7"), "there is none in"),
        ((log, "--roster", folder / "none.toml"), "cannot be read"),
        ((folder / "none.jsonl", "--roster", roster), "cannot be read"),
        ((folder, "--roster", roster), "cannot be read"),
    ):
        code, out, err = main(*arguments)
        assert (code, out, words in err) == (2, "", True), err


TERMS = {"config": "c" * 64, "base": "b" * 64, "manifest": "d" * 64, "roster": "e" * 64}


@pytest.fixture
def two_logs(folder: Path) -> Callable[..., tuple[Path, Path]]:
    """Logs of a server that counted clinic-1 in `counted` of three rounds, and of that site."""

    def write(counted: set[int], trained: set[int], **own: str) -> tuple[Path, Path]:
        server, site = folder / "audit.jsonl", folder / "clinic-1.jsonl"
        for path in (server, site):
            path.unlink(missing_ok=True)
        with AuditLog(server, read_identity(folder / "server", SERVER)) as log:
            log.append(Event.SERVER_STARTED, {"run": "r", **TERMS})
            for number in (1, 2, 3):
                names = ("clinic-1", "clinic-2") if number in counted else ("clinic-2",)
                log.append(Event.ROUND_COMMITTED, {"round": number, "counted": names})
        with AuditLog(site, read_identity(folder / "clinic-1", "clinic-1")) as log:
            log.append(Event.SITE_STARTED, {**TERMS, **own})
            place = {"request": "train", "round": 2}
            log.append(Event.REQUEST_ANSWERED, {"run": "another run", **place})
            log.append(Event.REQUEST_REFUSED, {"run": "r", "reason": "no", **place})
            log.append(Event.REQUEST_ANSWERED, {"run": "r", "request": "invite", "round": 2})
            for number in trained:
                details = {"run": "r", "request": "train", "round": number}
                log.append(Event.REQUEST_ANSWERED, details)
        return server, site

    return write


def test_logs_that_agree(folder: Path, main: Main, two_logs: Callable[..., Any]) -> None:
    roster = folder / "roster.toml"
    # In round 3 its answer came too late; round 4 was not committed any more.
    logs = two_logs({1, 2}, {1, 2, 3, 4})
    code, out, _ = main(*logs, "--roster", roster, command="compare")
    assert (code, "clinic-1 agree: run r, rounds: 3, counted in: 2" in out) == (0, True)
    assert "whose sum it is not in: 3" in out
    code, out, _ = main(*logs, "--roster", roster, "--json", command="compare")
    found = json.loads(out)
    assert (code, found["agree"], found["counted"], found["not_counted"]) == (0, True, [1, 2], [3])


def test_logs_that_contradict_each_other(
    folder: Path, main: Main, two_logs: Callable[..., Any]
) -> None:
    roster = folder / "roster.toml"
    code, out, _ = main(*two_logs({1, 2}, {1}), "--roster", roster, command="compare")
    assert code == 1
    assert "round 2: the server says that it counted clinic-1" in out
    assert "contradict each other" in out
    for key in TERMS:
        logs = two_logs({1}, {1}, **{key: "f" * 64})
        code, out, _ = main(*logs, "--roster", roster, "--json", command="compare")
        [difference] = json.loads(out)["differences"]
        assert (code, f"it had another {key}, ffff" in difference) == (1, True)


def test_only_sound_logs_of_a_server_and_a_site_are_compared(
    folder: Path, main: Main, two_logs: Callable[..., Any]
) -> None:
    server, site = two_logs({1}, {1})
    roster = folder / "roster.toml"
    for pair in ((site, server), (server, server), (site, site)):
        code, _, err = main(*pair, "--roster", roster, command="compare")
        assert (code, "first the server's log, then a site's" in err) == (2, True)
    site.write_bytes(site.read_bytes().replace(b'"round":2', b'"round":1', 1))
    code, _, err = main(server, site, "--roster", roster, command="compare")
    assert (code, f"{site}: line 3" in err) == (1, True)
