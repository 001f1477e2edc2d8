"""The README's way from nothing to a federation, its commands as they are written there."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployed import free_port
from e2e_helpers import Command, Launcher, read_rows, read_summary

README = Path(__file__).resolve().parents[2] / "README.md"
SITES = ("clinic-1", "clinic-2", "clinic-3")


def commands() -> list[str]:
    """What stands behind `fedtune` in the section, in order."""
    section = README.read_text(encoding="utf-8").partition("## On several machines")[2]
    blocks = re.findall(r"```\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    return [line.partition("fedtune ")[2] for block in blocks for line in block.splitlines()]


@pytest.fixture
def machines(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, tiny_base: Path
) -> Iterator[dict[str, Launcher]]:
    """An empty folder for the server, and for each site one with its data."""
    made = {}
    for name in ("server", *SITES):
        (tmp_path / name).mkdir()
        made[name] = Launcher(tmp_path / name, tmp_path_factory.mktemp("outputs"))
    yield made
    for launcher in made.values():
        launcher.end_all()


def edit(file: Path, **changes: str) -> None:
    """What a person writes into a file: other values of some keys."""
    text = file.read_text()
    for key, value in changes.items():
        pattern = rf"^{key.replace('_', '-')} = .*$"
        text, found = re.subn(pattern, f"{key.replace('_', '-')} = {value}", text, flags=re.M)
        assert found == 1, key
    file.write_text(text)


def test_from_nothing_to_a_finished_run(
    machines: dict[str, Launcher], tiny_base: Path, client_folders: Path, tmp_path: Path
) -> None:
    init, server_keys, site_keys, roster, server, client = commands()
    at_server, port = tmp_path / "server", free_port()
    labels = set()
    for name, source in zip(SITES, sorted(client_folders.glob("*/train.jsonl")), strict=False):
        rows = read_rows(source)
        labels |= {row["label"] for row in rows}
        with (tmp_path / name / "train.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([row["text"], row["label"]] for row in rows)

    def run(machine: str, line: str) -> Command:
        code, command = machines[machine].run(*shlex.split(line))
        assert code == 0, command.stderr
        return command

    run("server", init)
    federation = at_server / "my-federation"
    text = (federation / "federation.toml").read_text()
    listed = ", ".join(f'"{label}"' for label in sorted(labels))
    (federation / "federation.toml").write_text(
        re.sub(r"(?m)^digest = .*\n", "", text).replace("[data]", f"[data]\nlabels = [{listed}]")
    )
    # A small model and few steps, or this would take minutes.
    edit(federation / "federation.toml", path=f'"{tiny_base}"', steps="2", count="2")
    status = f'"127.0.0.1:{free_port()}"'
    edit(federation / "server.toml", host='"127.0.0.1"', port=str(port), status=status)
    run("server", server_keys.replace("fedtune.example.org", "localhost"))
    for name in SITES:
        said = run(name, site_keys.replace("clinic-1", name)).stdout
        assert "keys/public.toml is for the operator" in said
        shutil.copy(tmp_path / name / "keys" / "public.toml", at_server / f"{name}.toml")
    run("server", roster)
    for name in SITES:
        for file in ("federation.toml", "roster.toml", "server-keys/ca.crt", "client.toml"):
            shutil.copy(federation / file, tmp_path / name)
        edit(tmp_path / name / "client.toml", name=f'"{name}"', server=f'"localhost:{port}"')

    running = machines["server"].warm(*shlex.split(server))
    sites = [machines[name].warm(*shlex.split(client)) for name in SITES]
    assert running.wait() == 0, running.stderr
    assert running.stdout.startswith("finished: 2 of 2 rounds")
    summary = read_summary(federation / "run")
    assert (summary["status"], summary["masked"]) == ("finished", True)
    assert {found["name"] for found in summary["per_client"]} == set(SITES)
    assert (federation / "run" / "adapter" / "adapter_model.safetensors").is_file()
    for site in sites:
        # Without --once they wait for the next run.
        assert site.running
        assert "the run is over: 2 rounds, finished" in site.stderr
