"""`fedtune doctor` beside a federation of real processes; its predictions against a real run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from deployed import SITES, Federation
from e2e_helpers import Command, Launcher, read_metrics, read_summary, tree, wait_until

from fedtune.config import load_config
from fedtune.deploy.doctor.traffic import predict_traffic
from fedtune.deploy.keys import make_roster

MIB = 1 << 20


@dataclass(frozen=True)
class Report:
    """What one `fedtune doctor --json` said."""

    code: int
    value: dict[str, Any]

    @classmethod
    def of(cls, command: Command) -> Report:
        code = command.wait()
        assert command.stderr == ""
        return cls(code, json.loads(command.stdout))

    def statuses(self) -> dict[str, str]:
        return {finding["check"]: finding["status"] for finding in self.value["findings"]}

    def number(self, check: str, name: str) -> float:
        [found] = [f for f in self.value["findings"] if f["check"] == check]
        return float(found["numbers"][name])

    def text(self, check: str) -> str:
        return " ".join(f["finding"] for f in self.value["findings"] if f["check"] == check)


@dataclass(frozen=True)
class Run:
    """A federation that has run, and what the doctor said before."""

    federation: Federation
    server_before: Report
    before: Report
    stranger: Report


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Launcher]:
    started = Launcher(tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("outputs"))
    yield started
    started.end_all()


@pytest.fixture(scope="module")
def run(
    launcher: Launcher,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_base: Path,
    client_folders: Path,
) -> Run:
    folder = tmp_path_factory.mktemp("federation")
    federation = Federation(folder, launcher, tiny_base, client_folders)

    # In a roster of its own making, which the server does not have.
    public = [folder / "sites" / name / "keys" / "public.toml" for name in SITES]
    guest = federation.make_site("clinic-9", client_folders / "clinic-0" / "train.jsonl")
    make_roster(guest.parent.parent / "roster.toml", folder / "server-keys", [*public, guest])
    file = folder / "sites" / "clinic-9" / "client.toml"
    text, theirs = file.read_text(), f'"{folder / "roster.toml"}"'
    assert theirs in text
    file.write_text(text.replace(theirs, '"roster.toml"'))

    untouched = tree(folder)
    server_before = doctor(launcher, folder / "federation.toml")
    server = federation.server()
    wait_until(lambda: "listening at" in server.stderr, "the server to listen")
    before = doctor(launcher, client_file(federation, "clinic-0"), "--measure")
    stranger = doctor(launcher, file)
    now = tree(folder)
    assert {name: now[name] for name in untouched} == untouched
    assert {name.split("/")[0] for name in now.keys() - untouched.keys()} == {"run"}

    clients = [federation.warm_client(name) for name in SITES]
    assert server.wait() == 0, server.stderr
    for client in clients:
        assert client.wait() == 0, client.stderr
    return Run(federation, server_before, before, stranger)


def doctor(launcher: Launcher, *arguments: str | Path) -> Report:
    return Report.of(launcher.warm("doctor", *arguments, "--json"))


def client_file(federation: Federation, name: str) -> Path:
    return federation.folder / "sites" / name / "client.toml"


def test_files_that_cannot_be_used(
    run_main: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """What is no file is wrong usage; what is wrong in one is a finding among others."""
    for name, text in (("none.toml", None), ("broken.toml", "[site\n")):
        if text is not None:
            (tmp_path / name).write_text(text)
        code, out, err = run_main("doctor", tmp_path / name)
        assert (code, out) == (2, "")
        assert name in err
        assert "Traceback" not in err
    (tmp_path / "client.toml").write_text('[site]\nnam = "a"\n')
    (tmp_path / "federation.toml").write_text("[data]\n")
    for name, words in (("client.toml", "site.nam"), ("federation.toml", "server.toml")):
        code, out, err = run_main("doctor", tmp_path / name, "--json")
        assert (code, err) == (1, "")
        report = Report(code, json.loads(out))
        assert report.statuses().pop("files") == "problem"
        assert words in report.text("files")
        assert report.statuses()["cores"] == "ok"


def test_a_machine_alone(run_main: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run_main("doctor")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "software"
    assert "\nmachine\n" in out
    assert out.splitlines()[-1].startswith("0 problems, 0 warnings, ")


def test_a_federation_that_is_in_order(run: Run) -> None:
    assert (run.server_before.code, run.before.code) == (0, 0)
    assert run.server_before.value["role"] == "server"
    assert set(run.server_before.statuses().values()) == {"ok"}
    assert run.before.value["role"] == "site"
    found = run.before.statuses()
    # Not pinned yet; and what a tenth of the clinics' texts are too long for.
    unpinned = found.pop("roster")
    found.pop("content", None)
    found.pop("length of texts")
    assert unpinned == "warning"
    assert set(found.values()) == {"ok"}
    assert abs(run.before.number("clock", "offset_seconds")) < 2
    assert run.before.number("certificate", "days_left") == pytest.approx(397, abs=0.1)


def test_a_site_that_the_server_does_not_know(run: Run) -> None:
    assert run.stranger.code == 1
    problems = [name for name, status in run.stranger.statuses().items() if status == "problem"]
    assert problems == ["admission"]
    assert "no such transport key" in run.stranger.text("admission")


def test_bytes_are_predicted(run: Run) -> None:
    """Against those that the server counted, in each round."""
    for record in read_metrics(run.federation.run):
        for way in ("up", "down"):
            real = record[f"bytes_{way}"]
            name = f"bytes_{way}_per_round"
            assert run.before.number("traffic", name) == pytest.approx(real / 3, rel=0.1)
            assert run.server_before.number("traffic", name) == pytest.approx(real, rel=0.1)
    assert (
        run.before.number("model", "adapter_parameters")
        == (read_summary(run.federation.run)["adapter_parameters"])
    )


@pytest.mark.parametrize("settings", [[], ["update.bits=16", "update.clip=20"]])
def test_bytes_of_a_run_without_masks_are_predicted(
    launcher: Launcher, tiny_base: Path, client_folders: Path, settings: list[str]
) -> None:
    """Against a simulation's, where only the messages' carrier is another."""
    out = launcher.folder / f"plain-{len(settings)}"
    overrides = [*settings, f"base.path='{tiny_base}'", "train.steps=1", "rounds.count=1"]
    if not settings:
        overrides += ["update.compress=float16"]
    arguments = [part for setting in overrides for part in ("--set", setting)]
    arguments += ["--set", "secagg.enabled=false"]
    if not settings:
        arguments += ["--set", "update.bits=unset", "--set", "update.clip=unset"]
    code, command = launcher.run(
        "simulate", "--data", client_folders, "--out", out, "--workers", "0", *arguments
    )
    assert code == 0, command.stderr
    [record] = read_metrics(out)
    config = load_config(out / "config.toml")
    size = read_summary(out)["adapter_parameters"]
    found = predict_traffic(config, size, "clinic-0", record["clients"])
    assert found.up * len(record["clients"]) == pytest.approx(record["bytes_up"], rel=0.1)
    # Clients have no tests of their own: the adapter goes down once.
    assert found.down * len(record["clients"]) == pytest.approx(record["bytes_down"], rel=0.1)


def test_memory_is_predicted_of_a_server(run: Run) -> None:
    """Half to twice: what the processes of this run took at most, without the SuperLink's."""
    real = read_summary(run.federation.run)["peak_rss_mb"] * MIB
    predicted = run.server_before.number("memory", "need_bytes") - 180 * MIB
    assert 0.5 < predicted / real < 2


def test_memory_is_predicted_of_a_site(run: Run) -> None:
    """Half to twice, against a training process's real peak."""
    real = run.before.number("training", "peak_bytes")
    assert 0.5 < _of_training(run.before) / real < 2


def test_memory_of_activations_is_predicted(
    launcher: Launcher, tiny_base: Path, client_folders: Path, tmp_path: Path, run: Run
) -> None:
    """Of MiniLM, where they are not drowned in what a process has anyway."""
    federation = Federation(tmp_path, launcher, tiny_base, client_folders)
    file = tmp_path / "federation.toml"
    text = file.read_text().replace(str(tiny_base), "all-MiniLM-L6-v2")
    text = text.replace("max-length = 32", "max-length = 128")
    file.write_text(text.replace("steps = 6", "steps = 6\nbatch-size = 16"))
    train = tmp_path / "sites" / "clinic-0" / "train.jsonl"
    lines = [json.loads(line) for line in train.read_text().splitlines()]
    for line in lines:
        line["text"] *= 40  # all of them are cut
    train.write_text("".join(json.dumps(line) + "\n" for line in lines))

    found = doctor(launcher, client_file(federation, "clinic-0"), "--measure")
    assert found.number("length of texts", "share_cut") == 1
    real, predicted = found.number("training", "peak_bytes"), _of_training(found)
    assert 0.5 < predicted / real < 2
    # What a tiny model takes is what a process has anyway.
    real -= run.before.number("training", "peak_bytes")
    predicted -= _of_training(run.before)
    assert real > 250 * MIB
    assert 0.5 < predicted / real < 2


def _of_training(report: Report) -> float:
    """What is predicted of the process that trains, without the one that talks to the network."""
    return report.number("memory", "need_bytes") - 120 * MIB
