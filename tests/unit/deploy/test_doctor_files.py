"""Keys, certificates, rows and models, each spoilt as it happens in practice."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from doctor_helpers import only, statuses

from fedtune.base.resolve import digest_base, resolve_base
from fedtune.config import Config, load_config, load_server
from fedtune.deploy import keys
from fedtune.deploy.doctor.data import examine_base, examine_lengths, examine_rows
from fedtune.deploy.doctor.findings import Examination, Finding, Verdict
from fedtune.deploy.doctor.keys import examine_server_keys, examine_site_keys
from fedtune.deploy.doctor.machine import Needs, examine_machine
from fedtune.deploy.doctor.site import examine_site
from fedtune.deploy.init import init_rehearsal
from fedtune.deploy.site_files import SiteFiles
from fedtune.errors import KeyFileError

NAME = "hospital-1"
BASE = "all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation of three sites. Do not write to it."""
    folder = tmp_path_factory.mktemp("rehearsal") / "federation"
    init_rehearsal(folder, "hospitals", 3, 9092)
    return folder


@pytest.fixture
def federation(rehearsal: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(rehearsal, tmp_path / "federation"))


@pytest.fixture
def site(federation: Path) -> Path:
    return federation / "sites" / NAME


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def site_keys(site: Path) -> Examination:
    examination = Examination()
    examine_site_keys(examination, SiteFiles.read(site / "client.toml"))
    return examination


def server_keys(federation: Path) -> Examination:
    examination = Examination()
    listen = load_server(federation / "server.toml").server
    examine_server_keys(examination, federation, listen)
    return examination


def test_keys_that_are_in_order(federation: Path, site: Path) -> None:
    found = statuses(site_keys(site))
    # Nobody has said which roster is the right one.
    assert found.pop("roster") == "warning"
    assert set(found.values()) == {"ok"}
    assert set(statuses(server_keys(federation)).values()) == {"ok"}


def test_a_roster_is_the_one_that_was_told_on_another_way(federation: Path, site: Path) -> None:
    digest = keys.read_roster(federation / "roster.toml").roster.digest.hex()
    edit(site / "client.toml", '# roster-digest = "..."', f'roster-digest = "{digest}"')
    assert only(site_keys(site), "roster").status == "ok"
    edit(site / "client.toml", digest, digest[::-1])
    found = only(site_keys(site), "roster")
    assert found.status == "problem"
    assert digest in found.finding
    assert digest[::-1] in found.finding


def test_keys_that_others_can_read(federation: Path, site: Path) -> None:
    (site / "keys" / keys.TRANSPORT).chmod(0o640)
    wrong = [f for f in site_keys(site).findings if f.status == "problem"]
    assert {f.check for f in wrong} == {"private key", "keys in the roster"}
    assert all("others can read this private key" in f.finding for f in wrong)
    assert all(f.advice.startswith("chmod 600 ") for f in wrong)
    (federation / "server-keys" / keys.AUTHORITY_KEY).chmod(0o644)
    [only_one] = [f for f in server_keys(federation).findings if f.status == "problem"]
    assert keys.AUTHORITY_KEY in only_one.finding


@pytest.mark.parametrize("name", [keys.IDENTITY, keys.TRANSPORT])
def test_keys_that_the_roster_does_not_have(site: Path, name: str) -> None:
    keys.make_site_keys(site / "new", NAME)
    shutil.copy(site / "new" / name, site / "keys" / name)
    found = only(site_keys(site), "keys in the roster")
    assert found.status == "problem"
    assert "another" in found.finding


def test_files_that_are_not_there(federation: Path, site: Path) -> None:
    (federation / "roster.toml").unlink()
    (federation / "server-keys" / keys.AUTHORITY).unlink()
    (site / "keys" / keys.IDENTITY).unlink()
    found = site_keys(site)
    assert statuses(found)["roster"] == statuses(found)["authority"] == "problem"
    assert statuses(found)["keys in the roster"] == "skipped"
    assert any("identity.key: cannot be read" in f.finding for f in found.findings)


def test_a_file_that_is_no_authority(federation: Path) -> None:
    folder = federation / "server-keys"
    shutil.copy(folder / keys.SERVER_CERTIFICATE, folder / keys.AUTHORITY)
    found = only(server_keys(federation), "authority")
    assert found.status == "problem"
    assert "not the certificate of an authority" in found.finding
    (folder / keys.AUTHORITY).write_text("nonsense")
    assert "PEM" in only(server_keys(federation), "authority").finding


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (keys.SERVER_KEY, "made for another key"),
        (keys.AUTHORITY, "not signed by ca.crt"),
        (keys.IDENTITY, "made for another server"),
    ],
)
def test_parts_of_two_sets_of_keys(federation: Path, name: str, words: str) -> None:
    keys.make_server_keys(federation / "new", ["localhost"])
    shutil.copy(federation / "new" / name, federation / "server-keys" / name)
    [found] = [f for f in server_keys(federation).findings if f.status == "problem"]
    assert words in found.finding


def test_certificates_that_end(federation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(federation / "server-keys")
    monkeypatch.setattr(keys, "AUTHORITY_DAYS", 12)
    monkeypatch.setattr(keys, "SERVER_DAYS", -0.02)
    keys.make_server_keys(federation / "server-keys", ["localhost"])
    found = server_keys(federation)
    assert only(found, "authority").status == "warning"
    assert only(found, "authority").numbers["days_left"] == pytest.approx(12, abs=0.1)
    assert only(found, "certificate").status == "problem"
    assert "has expired" in only(found, "certificate").finding


def test_a_server_that_listens_under_another_name(federation: Path) -> None:
    edit(federation / "server.toml", 'host = "127.0.0.1"', 'host = "127.0.0.2"')
    found = only(server_keys(federation), "certificate")
    assert found.status == "warning"
    assert "127.0.0.2" in found.finding
    edit(federation / "server.toml", 'host = "127.0.0.2"', 'host = "0.0.0.0"')
    assert only(server_keys(federation), "certificate").status == "ok"


def rows(config: Config, train: Path, test: Path | None = None) -> list[Finding]:
    examination = Examination()
    examine_rows(examination, config, NAME, train, test)
    return examination.findings


def test_rows_are_counted(federation: Path, site: Path) -> None:
    config = load_config(federation / "federation.toml")
    with (site / "train.csv").open(newline="") as file:
        counts = Counter(row["label"] for row in csv.DictReader(file))
    first, *warnings = rows(config, site / "train.csv")
    assert first.status == "ok"
    assert first.numbers["rows"] == counts.total()
    assert {name: first.numbers[name] for name in config.data.labels} == {
        name: counts[name] for name in config.data.labels
    }
    held = len(counts)
    assert any(f"{NAME}: {held}" in f.finding for f in warnings) == (held < len(config.data.labels))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        ("text,label\n", "has no rows"),
        ("text,label\n ,Eye\n", "line 2: 'text' is empty"),
        ("text,label\nsecret,Eye\nsecret,Nobody\nsecret,Nobody\n", "2 rows of 3"),
        ("secret of Mr A,Eye\nsecret of Mr B,Eye\n", "line 1: no column 'text'"),
        ("label,text\nsecret one,Eye\n", "1 row of 1"),
    ],
)
def test_rows_that_cannot_be_used(
    federation: Path, site: Path, content: str | None, words: str
) -> None:
    """Where, and why; but nothing that stands in the file."""
    config = load_config(federation / "federation.toml", ['data.labels=["Eye", "Ear"]'])
    train = site / "train.csv"
    train.unlink() if content is None else train.write_text(content)
    [found] = rows(config, train)
    assert found.status == "problem"
    assert words in found.finding
    assert "secret" not in found.finding + found.advice
    assert "Nobody" not in found.finding + found.advice


def test_rows_that_are_there_twice(federation: Path, site: Path) -> None:
    config = load_config(federation / "federation.toml", ['data.labels=["Eye", "Ear"]'])
    (site / "train.csv").write_text("text,label\na,Eye\na,Eye\nb,Ear\n")
    (site / "test.csv").write_text("text,label\nb,Ear\n")
    found = rows(config, site / "train.csv", site / "test.csv")
    assert [f.status for f in found] == ["ok", "ok", "warning", "warning"]
    assert "1 training rows repeat" in found[2].finding
    assert "also trained on" in found[3].finding


def test_long_texts_are_counted_in_tokens(federation: Path, site: Path) -> None:
    """MiniLM's vocabulary has these words whole; two tokens stand around every text."""
    config = load_config(federation / "federation.toml", ['data.labels=["Eye", "Ear"]'])
    lengths = [3, 8, 9, 30]
    lines = [f"{'heart ' * (length - 2)}{place},Eye\n" for place, length in enumerate(lengths)]
    (site / "train.csv").write_text("text,label\n" + "".join(lines))
    examination = Examination()
    examples = examine_rows(examination, config, NAME, site / "train.csv", None)
    assert examples is not None
    assert examine_lengths(examination, resolve_base(BASE), examples, 9) == 9
    found = only(examination, "length of texts")
    assert found.status == "warning"
    # One token more for the number behind each.
    assert found.numbers == {"share_cut": 0.5, "longest": 31}


def test_the_base_model_is_the_agreed_one(federation: Path, tmp_path: Path) -> None:
    config = load_config(federation / "federation.toml")
    right = digest_base(resolve_base(BASE))
    for accepted, status in (((), "ok"), ((right,), "ok"), (("0" * 64,), "problem")):
        examination = Examination()
        found = examine_base(examination, config, accepted)
        assert only(examination, "base model").status == status
        assert right in only(examination, "base model").finding
        assert found == (None if status == "problem" else (resolve_base(BASE), right))

    folder = Path(shutil.copytree(resolve_base(BASE), tmp_path / "base"))
    weights = folder / "model.safetensors"
    with weights.open("rb+") as file:
        file.truncate(weights.stat().st_size - 1)
    for name, words in ((str(folder), "is not whole"), (str(tmp_path / "none"), "no such folder")):
        config = load_config(federation / "federation.toml", [f"base.path='{name}'"])
        examination = Examination()
        assert examine_base(examination, config, ()) is None
        assert words in only(examination, "base model").finding


def machine(folder: Path, needs: Needs, threads: int = 1) -> Examination:
    examination = Examination()
    examine_machine(examination, folder, needs, threads, "cpu")
    return examination


def test_a_machine_that_is_too_small(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    found = machine(tmp_path / "not" / "there" / "yet", Needs(disk=1000, memory=1000))
    assert set(statuses(found).values()) == {"ok"}
    assert only(found, "disk").numbers["free_bytes"] == pytest.approx(free, rel=0.1)

    found = machine(tmp_path, Needs(memory=1 << 50), threads=1000)
    assert statuses(found) == {
        "disk": "ok",
        "memory": "problem",
        "cores": "warning",
        "device": "ok",
    }
    assert only(found, "memory").numbers["need_bytes"] == 1 << 50
    assert all(f.advice for f in found.findings if f.status != "ok")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; where none may be made, the kernel's own, which has no space."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        yield Path("/proc")
        return
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small(small_disk: Path) -> None:
    found = only(machine(small_disk, Needs(disk=65 << 10)), "disk")
    assert found.status == "problem"
    assert found.numbers["free_bytes"] <= 64 << 10
    if small_disk != Path("/proc"):
        assert only(machine(small_disk, Needs(disk=60 << 10)), "disk").status == "warning"
        assert only(machine(small_disk, Needs(disk=30 << 10)), "disk").status == "ok"


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    examination = Examination()
    examine_machine(examination, tmp_path, device="cuda:99")
    assert only(examination, "device").status == "problem"
    assert "CUDA devices" in only(examination, "device").finding


def test_a_check_that_fails_ends_no_other() -> None:
    """And what it quotes stays where it is."""

    def crash() -> Verdict[int]:
        raise ZeroDivisionError("the text of a patient")

    def refuse() -> Verdict[int]:
        raise KeyFileError("a.key: others can read it; chmod 600 a.key")

    examination = Examination()
    examination.begin("group")
    assert examination.run("crash", crash) is None
    assert examination.run("refuse", refuse) is None
    assert examination.run("fine", lambda: Verdict("ok", "fine", value=3)) == 3
    assert examination.failed
    assert "patient" not in str(examination.to_json())
    assert [(f.status, f.finding) for f in examination.findings] == [
        ("problem", "the check itself failed with ZeroDivisionError"),
        ("problem", "a.key: others can read it"),
        ("ok", "fine"),
    ]
    assert examination.findings[1].advice == "chmod 600 a.key"


def test_a_base_model_that_is_not_the_agreed_one(federation: Path, tmp_path: Path) -> None:
    digest, other = digest_base(resolve_base(BASE)), tmp_path / "other"
    shutil.copytree(resolve_base(BASE), other)
    (other / "vocab.txt").write_text("")
    examination = Examination()
    config = load_config(federation / "federation.toml", [f"base.path='{other}'"])
    assert config.base.digest == digest  # as `fedtune init` wrote it
    examine_base(examination, config, ())
    found = only(examination, "base model")
    assert found.status == "problem"
    assert f"but base.digest says {digest}" in found.finding


def test_a_base_model_that_will_come_from_the_server(federation: Path, site: Path) -> None:
    edit(federation / "federation.toml", f'"{BASE}"', '"nowhere/at-all/here"')
    examination = Examination()
    examine_site(examination, site / "client.toml", measured=False)
    found = only(examination, "base model")
    assert (found.status, "fetches it from the server" in found.advice) == ("warning", True)
    assert only(examination, "length of texts").status == "skipped"
    edit(site / "client.toml", "# base =", "base =")
    examination = Examination()
    examine_site(examination, site / "client.toml", measured=False)
    assert only(examination, "base model").status == "problem"
