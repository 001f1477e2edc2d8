"""`fedtune audit verify`: whom it trusts, what it says, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtune.audit.entry import Event
from fedtune.audit.log import AuditLog
from fedtune.deploy.keys import PUBLIC, make_roster, make_server_keys, make_site_keys, read_identity

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """Run `fedtune audit verify`: exit code, stdout, stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        from fedtune.cli import main as command

        monkeypatch.setattr("sys.argv", ["fedtune", "audit", "verify", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            command()
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
