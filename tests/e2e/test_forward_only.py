"""Federations that compute no gradient, by real processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployed import Federation
from e2e_helpers import (
    Launcher,
    adapter_bytes,
    adapter_tensors,
    read_metrics,
    read_summary,
)

from fedtune.secagg.keys import SERVER

K = 512
TRAIN = {
    "method": "forward-only",
    "optimizer": "sgd",
    "directions": K,
    "steps": 50,
    "lr": 10.0,
}
SETTINGS = tuple(word for key, value in TRAIN.items() for word in ("--set", f"train.{key}={value}"))


def _succeed(launcher: Launcher, *arguments: str) -> None:
    code, command = launcher.run(*arguments)
    assert code == 0, command.stderr


@pytest.fixture(scope="module")
def shared_launcher(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Any:
    started = Launcher(tmp_path_factory.mktemp("forward"), tmp_path_factory.mktemp("outputs"))
    yield started
    started.end_all()


@pytest.fixture(scope="module")
def run(shared_launcher: Launcher, quick: list[str]) -> Path:
    """A masked run of three rounds of the four clients. Only read it."""
    _succeed(shared_launcher, *quick, *SETTINGS, "--rounds", "3", "--out", "run")
    return shared_launcher.folder / "run"


def test_it_learns_from_losses_alone(run: Path) -> None:
    metrics = read_metrics(run)
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"] - 0.05
    assert metrics[-1]["accuracy"] > 0.4  # of four labels, of which the commonest is a third
    assert metrics[-1]["loss"] < np.log(4) - 0.05


def test_one_value_per_direction_travels(run: Path) -> None:
    summary = read_summary(run)
    down, up = summary["bytes_down_per_client_round"], summary["bytes_up_per_client_round"]
    assert summary["adapter_parameters"] > 2 * K
    # Keys, shares and signatures of four clients are the rest.
    assert 0 < down - 4 * K < 4_000
    ring_bits = 18  # of four clients with 16 bits each
    assert 0 < up - K * ring_bits / 8 < 2_000
    assert "forward-only in 512 directions" in summary["adapter"]
    assert "forward-only in 512 directions" in (run / "report.html").read_text()


def test_the_adapter_is_one_that_peft_loads(
    run: Path, run_main: Callable[..., tuple[int, str, str]], client_folders: Path
) -> None:
    code, out, err = run_main("eval", run, "--data", client_folders / "test.jsonl", "--json")
    assert code == 0, err
    final = read_summary(run)["final"]
    assert json.loads(out)["accuracy"] == final["accuracy"]
    assert json.loads(out)["loss"] == pytest.approx(final["loss"], abs=1e-4)
    passport = json.loads((run / "adapter" / "passport.json").read_text())
    assert (passport["method"], passport["directions"], passport["seed"]) == (
        "forward-only",
        K,
        0,
    )
    for name, value in adapter_tensors(run).items():
        # B and the head began at zero, and A stays what the seed made of it.
        assert np.count_nonzero(value) == value.size, name


def test_masks_change_no_bit_and_neither_does_the_number_of_workers(
    run: Path, shared_launcher: Launcher, quick: list[str]
) -> None:
    plain = (*quick, *SETTINGS, "--set", "secagg.enabled=false", "--rounds", "3", "--wire")
    _succeed(shared_launcher, *plain, "--workers", "1", "--out", "plain")
    assert adapter_bytes(shared_launcher.folder / "plain") == adapter_bytes(run)


def test_what_it_cannot_do_is_refused_before_anything_is_written(
    launcher: Launcher,
    quick: list[str],
    run_main: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(launcher.folder)
    for more, named in (
        (("--references",), "--references"),
        (("--set", "train.directions=4096"), "adapter's 2180 values"),
        (("--set", "train.optimizer=adamw"), "train.optimizer = sgd"),
    ):
        code, out, err = run_main(*quick, *SETTINGS, *more, "--out", "run")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert named in err
        assert list(launcher.folder.iterdir()) == []


def test_a_device_takes_part_with_a_forward_graph_alone(
    make_federation: Callable[..., Federation],
    tmp_path: Path,
    run_main: Callable[..., tuple[int, str, str]],
    edge_plain_python: Path,
) -> None:
    """In an environment without torch; the graphs with gradients were removed."""
    federation = make_federation(tables={"train": {**TRAIN, "steps": 10}, "rounds": {"count": 2}})
    site = federation.site("clinic-1")
    code, _, err = run_main(
        "edge", "build", federation.folder / "federation.toml", "--out", site / "artifacts"
    )
    assert code == 0, err
    for name in ("training.onnx", "checkpoint", "step.onnx"):
        for precision in ("float32", "int8"):
            (site / "artifacts" / precision / name).unlink()
    federation.set_machine("clinic-1", runtime="stepgraph")
    server = federation.server()
    device = federation.client("clinic-1", edge_plain_python)
    clients = [federation.warm_client(name) for name in ("clinic-0", "clinic-2")]
    assert server.wait() == 0, server.stderr
    for client in (device, *clients):
        assert client.wait() == 0, client.stderr
    assert "without gradients float32" in device.stderr
    assert all(r["clients"] == list(federation.sites) for r in read_metrics(federation.run))
    simulated = adapter_tensors(federation.simulate(tmp_path))
    for name, value in adapter_tensors(federation.run).items():
        np.testing.assert_allclose(value, simulated[name], atol=1e-4)


def test_a_deployed_run_ends_with_the_adapter_of_the_simulated_one(
    make_federation: Callable[..., Federation], tmp_path: Path
) -> None:
    """Over sockets and TLS, masked, bit for bit."""
    federation = make_federation(tables={"train": {**TRAIN, "steps": 10}, "rounds": {"count": 2}})
    server = federation.server()
    clients = [federation.warm_client(name) for name in federation.sites]
    assert server.wait() == 0, server.stderr
    for client in clients:
        assert client.wait() == 0, client.stderr
    assert adapter_bytes(federation.run) == adapter_bytes(federation.simulate(tmp_path))
    assert read_summary(federation.run)["bytes_down_per_client_round"] < 4 * K + 4_000
    # Server and sites agree on the start, which never travels, by the manifest's digest.
    agreed = {
        dict(federation.verified(name))[event]["manifest"]
        for name, event in ((SERVER, "server-started"), ("clinic-0", "site-started"))
    }
    assert len(agreed) == 1
    passport = json.loads((federation.run / "adapter" / "passport.json").read_text())
    rounds = [found for event, found in federation.verified(SERVER) if event == "round-committed"]
    assert rounds[-1]["adapter"] == passport["adapter_digest"]
