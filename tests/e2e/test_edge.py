"""Devices without PyTorch beside workstations with it, in one federation of real processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from deployed import Federation
from e2e_helpers import read_summary, wait_until
from safetensors.numpy import load_file

SITES = ("clinic-0", "clinic-1", "clinic-2", "clinic-3")
ROUNDS = 3


@pytest.fixture(scope="module")
def federation(make_federation: Callable[..., Federation]) -> Federation:
    """Of two workstations and two devices, with the artifacts that the devices need."""
    made = make_federation(
        sites=SITES,
        # Finely rounded, so that what differs is the training.
        tables={"update": {"clip": 20.0, "bits": 24}, "rounds": {"count": ROUNDS}},
    )
    out = made.folder / "artifacts"
    code, command = made.command("edge", "build", made.folder / "federation.toml", "-o", out)
    assert code == 0, command.stderr
    digest = command.stdout.partition('artifacts-digest = "')[2].partition('"')[0]
    for name, runtime in (("clinic-2", "ort"), ("clinic-3", "stepgraph")):
        made.set_machine(name, runtime=runtime, artifacts=str(out), artifacts_digest=digest)
    return made


def _libraries(pid: int) -> str:
    """What a process and its children have mapped."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return "".join(Path(f"/proc/{p}/maps").read_text() for p in [str(pid), *children])


def test_devices_and_workstations_end_with_the_adapter_of_workstations_alone(
    federation: Federation, edge_python: Path, edge_plain_python: Path, tmp_path: Path
) -> None:
    """And the devices' environments have no torch: one has ONNX Runtime 1.19, one the newest."""
    server = federation.server()
    devices = {
        "clinic-2": federation.client("clinic-2", edge_python),
        "clinic-3": federation.client("clinic-3", edge_plain_python),
    }
    clients = {name: federation.warm_client(name) for name in ("clinic-0", "clinic-1")}
    for name, device in devices.items():
        wait_until(lambda d=device: "round 1: trained" in d.stderr, f"{name} to have trained")
        assert "onnxruntime" in (maps := _libraries(device.pid))
        assert "libtorch" not in maps
    assert server.wait() == 0, server.stderr
    for client in (*clients.values(), *devices.values()):
        assert client.wait() == 0, client.stderr

    simulated = federation.simulate(tmp_path)  # with PyTorch at all four
    found, expected = (
        load_file(run / "adapter" / "adapter_model.safetensors")
        for run in (federation.run, simulated)
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert np.abs(found[name] - value).max() < 2e-4, name
    moved = max(float(np.abs(value).max()) for name, value in expected.items() if "lora_B" in name)
    assert moved > 0.01
    summary = read_summary(federation.run)
    assert (summary["status"], summary["rounds"], summary["masked"]) == ("finished", ROUNDS, True)
    records = federation.check()
    assert all(len(record["clients"]) == len(SITES) for record in records)
    # One cannot tell from what the server keeps which of them had no PyTorch.
    for path in (federation.run / "adapter").iterdir():
        assert b"onnx" not in path.read_bytes().lower()


def test_a_device_with_spoiled_artifacts_takes_no_part(federation: Federation) -> None:
    name = "clinic-3"
    weights = federation.folder / "artifacts" / "float32" / "base.bin"
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        client = federation.client(name)
        assert client.wait() == 2
        assert "base.bin: its SHA-256 is" in client.stderr
    finally:
        weights.write_bytes(content)
    manifest = federation.folder / "artifacts" / "manifest.json"
    text = manifest.read_text()
    try:
        manifest.write_text(json.dumps(json.loads(text) | {"pad_id": 7}))
        client = federation.client(name)
        assert client.wait() == 2
        assert "artifacts-digest says" in client.stderr
    finally:
        manifest.write_text(text)


def test_a_budget_of_memory_that_nothing_fits_into_is_told(federation: Federation) -> None:
    name = "clinic-3"
    file = federation.site(name) / "client.toml"
    before = file.read_text()
    try:
        federation.set_machine(name, max_memory_mb=1)
        client = federation.client(name)
        assert client.wait() == 2
        assert "max-memory-mb leaves 0 MiB" in client.stderr
    finally:
        file.write_text(before)
