"""NanoAdapters at devices without PyTorch and at workstations with it, in one federation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from deployed import Federation, free_port
from e2e_helpers import Launcher, read_summary, wait_until
from safetensors.numpy import load_file

SITES = ("site-0", "site-1", "site-2")
WORKSTATION, DEVICE, BARE_DEVICE = SITES
ROUNDS, STEPS, BATCH = 2, 4, 4


@pytest.fixture(scope="module")
def federation(
    tmp_path_factory: pytest.TempPathFactory, answering_decoder: Path, questions: Path
) -> Iterator[Federation]:
    """Of a workstation and two devices, with the kit and the artifacts that they need."""
    folder = tmp_path_factory.mktemp("federation")
    launcher = Launcher(folder, tmp_path_factory.mktemp("outputs"))
    code, command = launcher.run(
        *("nano", "pretrain-connector", "--base", answering_decoder, "--steps", "20"),
        *("--data", questions / "captions.jsonl", "-o", "connector.safetensors"),
    )
    assert code == 0, command.stderr
    port = free_port()
    base = {
        "task": "visual-question-answering",
        "placement": "server",
        "connector": str(folder / "connector.safetensors"),
    }
    tables = {
        "base": base,
        "adapter": {"kind": "nano", "rank": 4},
        "train": {"steps": STEPS, "batch-size": BATCH, "lr": 0.02},
        "rounds": {"count": ROUNDS},
        # Exactly carried and finely rounded, so that what differs is the training.
        "split": {"activations": "float32"},
        "update": {"clip": 20.0, "bits": 24},
    }
    made = Federation(
        folder, launcher, answering_decoder, questions, SITES, tables, listen={"base-port": port}
    )
    file = folder / "federation.toml"
    code, command = made.command("nano", "kit", file, "-o", folder / "kit")
    assert code == 0, command.stderr
    [kit_digest] = re.findall(r'kit-digest = "(\w+)"', command.stdout)
    out = folder / "artifacts"
    code, command = made.command("edge", "build", file, "-o", out, "--kit", folder / "kit")
    assert code == 0, command.stderr
    [digest] = re.findall(r'artifacts-digest = "(\w+)"', command.stdout)
    made.let_sites_ask(port)
    made.set_machine(WORKSTATION, kit=str(folder / "kit"), kit_digest=kit_digest)
    for name in (DEVICE, BARE_DEVICE):
        made.set_machine(name, runtime="stepgraph", artifacts=str(out), artifacts_digest=digest)
    yield made
    launcher.end_all()


def _libraries(pid: int) -> str:
    """What a process and its children have mapped."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return "".join(Path(f"/proc/{p}/maps").read_text() for p in [str(pid), *children])


def test_devices_and_a_workstation_end_with_the_adapter_of_workstations_alone(
    federation: Federation, edge_nano_python: Path, tmp_path: Path
) -> None:
    """One device's environment has no torch at all; the other's ONNX Runtime is the older build."""
    server = federation.server()
    bare = federation.client(BARE_DEVICE, edge_nano_python)
    clients = [federation.warm_client(name) for name in (WORKSTATION, DEVICE)]
    wait_until(lambda: "round 1: trained" in bare.stderr, "the device to have trained")
    assert "onnxruntime" in (maps := _libraries(bare.pid))
    assert "libtorch" not in maps
    assert server.wait() == 0, server.stderr
    for client in (*clients, bare):
        assert client.wait() == 0, client.stderr
        assert "Traceback" not in client.stderr
    assert "stepgraph, artifacts" in bare.stderr

    simulated = federation.simulate(tmp_path)  # with PyTorch at all three
    found, expected = (
        load_file(run / "adapter" / "adapter_model.safetensors")
        for run in (federation.run, simulated)
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=3e-4, err_msg=name)
    assert max(float(np.abs(value).max()) for value in expected.values()) > 0.1
    summary, other = read_summary(federation.run), read_summary(simulated)
    assert (summary["status"], summary["rounds"], summary["masked"]) == ("finished", ROUNDS, True)
    assert summary["cut"]["examples"] == len(SITES) * ROUNDS * STEPS * BATCH
    for key in ("tokens", "bytes_up", "bytes_down"):
        assert summary["cut"][key] == other["cut"][key]
    assert summary["final"]["loss"] == pytest.approx(other["final"]["loss"], abs=0.01)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"precision": "int8"}, "not built for NanoAdapters"),
        ({"max_memory_mb": 100}, "not built for NanoAdapters"),
    ],
)
def test_what_is_not_built_is_refused_at_the_start(
    federation: Federation, keys: dict[str, object], said: str
) -> None:
    file = federation.site(DEVICE) / "client.toml"
    before = file.read_text()
    try:
        federation.set_machine(DEVICE, **keys)
        client = federation.warm_client(DEVICE)
        assert client.wait() == 2
        assert said in client.stderr
    finally:
        file.write_text(before)


def test_a_device_without_grpc_is_told_what_to_install(
    federation: Federation, edge_plain_python: Path
) -> None:
    client = federation.client(DEVICE, edge_plain_python)
    assert client.wait() == 2
    assert "not installed: grpc, PIL" in client.stderr
    assert "requirements.edge-nano.txt" in client.stderr
    assert "Traceback" not in client.stderr
