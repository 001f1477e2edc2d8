"""A federation that trains against an emulator of its base model: simulated, then deployed."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployed import Federation, free_port
from e2e_helpers import Launcher, read_summary
from safetensors.numpy import load_file
from vqa_files import TESTED

ROUNDS, STEPS, BATCH = 2, 6, 4
SITES = ("site-0", "site-1", "site-2")


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    made = Launcher(tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("outputs"))
    yield made
    made.end_all()


@pytest.fixture(scope="module")
def simulated(launcher: Launcher, deep_decoder: Path, questions: Path) -> Path:
    """A run with half of the decoder's six layers, of the public questions beside the clients'."""
    sets = [f"train.steps={STEPS}", f"train.batch-size={BATCH}", "train.lr=0.02"]
    sets += ["adapter.rank=4", "data.min-examples=1", "secagg.enabled=false"]
    sets += ["update.clip=unset", "update.bits=unset", "base.placement=emulator"]
    flags = [part for override in sets for part in ("--set", override)]
    code, command = launcher.run(
        *("simulate", "--preset", "vqa", "--data", questions, "--base", deep_decoder),
        *("--rounds", str(ROUNDS), "--workers", "2", "--out", "run", *flags),
    )
    assert code == 0, command.stderr
    return launcher.folder / "run"


def adapter_of(run: Path) -> np.ndarray:
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    return np.concatenate([tensors[name].reshape(-1) for name in sorted(tensors)])


def references(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {reference["name"]: reference for reference in summary["references"]}


def test_it_learns_against_the_emulator_and_is_tested_in_the_whole_model(
    simulated: Path, launcher: Launcher, questions: Path
) -> None:
    summary = read_summary(simulated)
    found = references(summary)
    # It is in the emulator that the loss was brought down.
    assert found["emulator"]["loss"] < found["emulator-base"]["loss"] - 0.05
    assert found["emulator-base"]["loss"] != pytest.approx(found["base"]["loss"], abs=1e-3)
    assert summary["cut"] is None
    assert "3 of 6 layers, shared" in summary["adapter"]
    assert "federated adapter, in the emulator" in (simulated / "report.html").read_text()
    # `fedtune eval` knows of no emulator.
    code, command = launcher.run("eval", simulated, "--data", questions / "test.jsonl", "--json")
    assert code == 0, command.stderr
    again, final = json.loads(command.stdout), summary["final"]
    assert again["examples"] == TESTED
    assert again["accuracy"] == pytest.approx(final["accuracy"])
    assert again["loss"] == pytest.approx(final["loss"], abs=1e-4)
    assert again["loss"] != pytest.approx(found["emulator"]["loss"], abs=1e-3)


@pytest.fixture(scope="module")
def federation(
    tmp_path_factory: pytest.TempPathFactory,
    deep_decoder: Path,
    answering_decoder: Path,
    questions: Path,
) -> Iterator[Federation]:
    """Sites that have the kit and no base model: what `base.path` names there is another one."""
    folder = tmp_path_factory.mktemp("federation")
    launcher = Launcher(folder, tmp_path_factory.mktemp("outputs"))
    base = {
        "task": "visual-question-answering",
        "placement": "emulator",
        "connector": "connector.safetensors",
    }
    made = Federation(
        folder,
        launcher,
        deep_decoder,
        questions,
        SITES,
        {
            "base": base,
            "emulator": {"layers": 4, "path": "emulator"},
            "adapter": {"kind": "nano", "rank": 4},
            "train": {"steps": STEPS, "batch-size": BATCH, "lr": 0.02},
            "rounds": {"count": 1},
        },
        listen={"base": str(deep_decoder), "base-port": free_port()},
    )
    file = folder / "federation.toml"
    for arguments in (
        (
            *("pretrain-connector", "--base", deep_decoder, "--steps", "20"),
            *("--data", questions / "captions.jsonl", "-o", "connector.safetensors"),
        ),
        ("emulator", file, "--texts", questions / "public.jsonl"),
        ("kit", file, "-o", "kit"),
    ):
        code, command = made.command("nano", *arguments)
        assert code == 0, command.stderr
    [digest] = re.findall(r'kit-digest = "(\w+)"', command.stdout)
    for name in SITES:
        made.set_machine(name, kit=str(folder / "kit"), kit_digest=digest)
    yield made
    launcher.end_all()


def test_sites_train_from_the_kit_alone_as_a_simulation_does(
    federation: Federation, deep_decoder: Path, tmp_path: Path
) -> None:
    expected = federation.simulate(tmp_path)
    text = (federation.folder / "federation.toml").read_text()
    assert str(deep_decoder) in text
    (federation.folder / "federation.toml").write_text(text.replace(str(deep_decoder), "/nowhere"))
    [port] = re.findall(r"base-port = (\d+)", (federation.folder / "server.toml").read_text())
    with socket.create_server(("127.0.0.1", int(port))):  # the server leaves it alone
        server = federation.server()
        clients = [federation.warm_client(name) for name in SITES]
        assert server.wait() == 0, server.stderr
    for client in clients:
        assert client.wait() == 0, client.stderr
        assert "4 of 6 layers, shared" in client.stderr
        assert "Traceback" not in client.stderr
    np.testing.assert_allclose(adapter_of(federation.run), adapter_of(expected), atol=1e-5)
    assert np.abs(adapter_of(expected)).max() > 0.1
    summary, simulated = read_summary(federation.run), read_summary(expected)
    assert summary["cut"] is None
    assert summary["final"]["loss"] == pytest.approx(simulated["final"]["loss"], abs=1e-4)
    for name in ("base", "emulator", "emulator-base"):
        loss = references(simulated)[name]["loss"]
        assert references(summary)[name]["loss"] == pytest.approx(loss, abs=1e-4)
    check_doctor(federation, summary["base_digest"])


def check_doctor(federation: Federation, base_digest: str) -> None:
    """It knows that a site has a kit, needs no server of a base model, and what it trains."""

    def findings(path: Path) -> dict[str, dict[str, Any]]:
        _, command = federation.command("doctor", path, "--json")
        return {check["check"]: check for check in json.loads(command.stdout)["findings"]}

    site = federation.site(SITES[0]) / "client.toml"
    policy = f'[policy]\nbase-digests = ["{base_digest}"]\n'
    site.write_text(site.read_text().replace("[policy]\n", policy))
    found = findings(site)
    assert found["kit"]["status"] == found["policy"]["status"] == "ok", found
    assert "4 of 6 layers, shared" in found["kit"]["finding"]
    assert "its server" not in found
    file = federation.folder / "federation.toml"
    found = findings(file)
    assert found["emulator"]["status"] == "warning"  # its digest is not agreed
    assert "base port" not in found
    weights = federation.folder / "emulator" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert findings(file)["emulator"]["status"] == "problem"
