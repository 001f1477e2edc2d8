"""Federations with a part of the adapter that stays at each client, by real processes."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deployed import Federation
from e2e_helpers import Launcher, adapter_bytes, adapter_tensors, read_metrics, read_summary
from torch import nn

from fedtune import Client, LoRA, simulate
from fedtune.records import RoundRecord

HEAD = ("--set", 'adapter.private=["classifier"]')


def _private_parts(database: Path) -> dict[str, tuple[int, bytes]]:
    """Round and private part of each client in a memory of sites."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as opened:
        rows = opened.execute("SELECT client, round, after FROM private_parts").fetchall()
    return {client: (number, bytes(after)) for client, number, after in rows}


@pytest.fixture(scope="module")
def shared_launcher(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Any]:
    started = Launcher(tmp_path_factory.mktemp("private"), tmp_path_factory.mktemp("outputs"))
    yield started
    started.end_all()


@pytest.fixture(scope="module")
def run(shared_launcher: Launcher, quick: list[str]) -> Path:
    """A masked run of three rounds of the four clients, with a head for each. Only read it."""
    code, command = shared_launcher.run(*quick, *HEAD, "--out", "run")
    assert code == 0, command.stderr
    return shared_launcher.folder / "run"


# -------------------------------------------------------------------------- contradicting clients
class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.tanh(self.inner(inputs)))
        return logits


def _contradicting() -> list[Client]:
    """Two clients with the same inputs, one of which calls black what the other calls white."""
    rng = np.random.default_rng(4)
    inputs = torch.from_numpy(rng.normal(size=(60, 4)).astype(np.float32))
    inputs = inputs[inputs[:, 0].abs() > 0.2]
    labels = (inputs[:, 0] > 0).long()
    rows = [
        [(x, int(y if own else 1 - y)) for x, y in zip(inputs, labels, strict=True)]
        for own in (True, False)
    ]
    return [Client(name, own[:30], own[30:]) for name, own in zip("ab", rows, strict=True)]


def _simulate(out: Path, private: list[str], **more: Any) -> Any:
    torch.manual_seed(1)
    settings = {
        "adapter.private": private,
        "train.lr": 0.05,
        "train.steps": 12,
        "train.schedule": "constant",
    }
    lora = LoRA(rank=2, targets=("inner",), also_train=("head",))
    return simulate(
        Net(),
        _contradicting(),
        adapter=lora,
        rounds=8,
        settings=settings,
        out=out,
        quiet=True,
        **more,
    )


def test_clients_that_contradict_each_other_are_both_right_with_a_head_each(tmp_path):
    """With one head for both, what one gets right the other gets wrong: their mean is a half."""
    common = _simulate(tmp_path / "common", [], workers=0).summary
    both = [client.accuracy for client in common.per_client]
    assert sum(both) == 1.0
    assert [client.personal_accuracy for client in common.per_client] == [None, None]
    own = _simulate(tmp_path / "own", ["head"], workers=0).summary
    assert min(client.personal_accuracy for client in own.per_client) > 0.9
    # A round's score is of each client's own test set with its own head; the head that all began
    # with contradicts one as much as it agrees with the other.
    assert own.final.accuracy > 0.9
    assert sum(client.accuracy for client in own.per_client) == 1.0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_is_gone_on_with_learns_the_same(tmp_path, workers):
    whole = _simulate(tmp_path / "whole", ["head"], workers=0)

    def stop(record: RoundRecord) -> None:
        if record.round in (2, 5):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            _simulate(tmp_path / "again", ["head"], workers=workers, on_round=stop, resume=True)
    again = _simulate(tmp_path / "again", ["head"], workers=workers, resume=True)
    assert adapter_bytes(again.path) == adapter_bytes(whole.path)
    assert _private_parts(again.path / "sites.db") == _private_parts(whole.path / "sites.db")
    assert again.summary.per_client == whole.summary.per_client


# ------------------------------------------------------------------------------------ a text model
def test_what_is_private_is_not_in_the_adapter_of_the_run(run):
    tensors = adapter_tensors(run)
    assert len(tensors) == 8  # two matrices at query and value of two layers
    assert not any("classifier" in name for name in tensors)
    size = sum(value.size for value in tensors.values())
    sent = read_summary(run)["bytes_up_per_client_round"]
    assert size * 2 < sent < size * 4  # of integers of 18 bits, and some keys and shares
    parts = _private_parts(run / "sites.db")
    assert {number for number, _ in parts.values()} == {3}
    assert len({own for _, own in parts.values()}) == len(parts) == 4
    head = 32 * 4 + 4
    assert {len(own) for _, own in parts.values()} == {4 * head}


def test_eval_says_what_the_run_said_of_a_client(run, client_folders, run_main):
    test = client_folders / "test.jsonl"
    for client in read_summary(run)["per_client"]:
        asked = ("eval", run, "--data", test, "--json")
        code, out, err = run_main(*asked, "--client", client["name"])
        assert code == 0, err
        assert json.loads(out)["accuracy"] == pytest.approx(client["personal_accuracy"])
        code, out, _ = run_main(*asked)
        assert json.loads(out)["accuracy"] == pytest.approx(client["accuracy"])


def test_export_is_of_one_client(run, run_main, tmp_path):
    from transformers import AutoModel

    code, _, err = run_main("export", run, "--out", tmp_path / "model")
    assert code == 2
    assert "--client" in err
    code, _, err = run_main("export", run, "--out", tmp_path / "model", "--client", "nobody")
    assert code == 2
    assert "nobody" in err
    code, _, err = run_main("export", run, "--out", tmp_path / "model", "--client", "clinic-1")
    assert code == 0, err
    assert AutoModel.from_pretrained(tmp_path / "model").config.hidden_size == 32
    own = np.frombuffer(_private_parts(run / "sites.db")["clinic-1"][1], "<f4")
    head = b"".join(path.read_bytes() for path in (tmp_path / "model").glob("classifier*"))
    assert own[:4].tobytes() in head or own[4:8].tobytes() in head


def test_a_pattern_that_fits_nothing_is_refused_with_the_names(run_main, quick, tmp_path):
    for pattern, named in (("nano_text", "classifier.weight"), ("base_model", "nothing to share")):
        out = tmp_path / "refused"
        code, _, err = run_main(*quick, "--set", f'adapter.private=["{pattern}"]', "--out", out)
        assert code == 2
        assert named in err
        assert not out.exists()


# --------------------------------------------------------------------------------------- deployed
def test_a_deployed_run_is_the_simulated_one(
    make_federation: Callable[..., Federation], tmp_path: Path
) -> None:
    """Over sockets, masked: the adapter and each site's own part, bit for bit."""
    federation = make_federation(
        tables={"adapter": {"private": ["classifier"]}, "rounds": {"count": 2}}
    )
    server = federation.server()
    clients = [federation.warm_client(name) for name in federation.sites]
    assert server.wait() == 0, server.stderr
    for client in clients:
        assert client.wait() == 0, client.stderr
    simulated = federation.simulate(tmp_path)
    assert adapter_bytes(federation.run) == adapter_bytes(simulated)
    assert all(r["clients"] == list(federation.sites) for r in read_metrics(federation.run))
    expected = _private_parts(simulated / "sites.db")
    for name in federation.sites:
        assert _private_parts(federation.site(name) / "site.db") == {name: expected[name]}
    # The server's files hold no site's part.
    parts = [own for _, own in expected.values()]
    for path in federation.run.rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        assert not any(own[:16] in data or own[-16:] in data for own in parts), path
