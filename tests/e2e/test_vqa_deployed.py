"""A base model that stays at the server, for sites in processes of their own, over TLS."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deployed import Federation, free_port
from e2e_helpers import Launcher, read_metrics, read_summary, wait_until
from safetensors.numpy import load_file
from split_service import tls_of
from vqa_files import QUESTIONS

from fedtune.base.answering import AnsweringDecoder
from fedtune.base.causal import CausalBase
from fedtune.deploy.site_files import SiteFiles
from fedtune.deploy.vision_site import load_questions
from fedtune.split.server import SplitServer, terms_of
from fedtune.train.trainer import LocalPlan

SITES = ("site-0", "site-1", "site-2")
ROUNDS, STEPS, BATCH = 3, 4, 4


@pytest.fixture(scope="module")
def connector(
    tmp_path_factory: pytest.TempPathFactory, answering_decoder: Path, questions: Path
) -> Path:
    """Made by the command."""
    folder = tmp_path_factory.mktemp("connector")
    launcher = Launcher(folder, tmp_path_factory.mktemp("outputs"))
    code, command = launcher.run(
        *("nano", "pretrain-connector", "--base", answering_decoder, "--steps", "20"),
        *("--data", questions / "captions.jsonl", "-o", "connector.safetensors"),
    )
    assert code == 0, command.stderr
    return folder / "connector.safetensors"


@pytest.fixture(scope="module")
def make(
    tmp_path_factory: pytest.TempPathFactory,
    answering_decoder: Path,
    questions: Path,
    connector: Path,
) -> Iterator[Callable[..., Federation]]:
    """A federation with the files and the kit that an operator sends."""
    launchers: list[Launcher] = []

    def make(**tables: dict[str, Any]) -> Federation:
        folder = tmp_path_factory.mktemp("federation")
        launchers.append(Launcher(folder, tmp_path_factory.mktemp("outputs")))
        port = free_port()
        base = {
            "task": "visual-question-answering",
            "placement": "server",
            "connector": str(connector),
        }
        federation = Federation(
            folder,
            launchers[-1],
            answering_decoder,
            questions,
            SITES,
            {
                "base": base,
                "adapter": {"kind": "nano", "rank": 4},
                "train": {"steps": STEPS, "batch-size": BATCH, "lr": 0.02},
                "rounds": {"count": ROUNDS},
                **tables,
            },
            listen={"base-port": port},
        )
        code, command = federation.command("nano", "kit", folder / "federation.toml", "-o", "kit")
        assert code == 0, command.stderr
        [digest] = re.findall(r'kit-digest = "(\w+)"', command.stdout)
        for name in SITES:
            federation.set_machine(name, kit=str(folder / "kit"), kit_digest=digest)
        federation.let_sites_ask(port)
        return federation

    yield make
    for launcher in launchers:
        launcher.end_all()


def adapter_of(run: Path) -> np.ndarray:
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    return np.concatenate([tensors[name].reshape(-1) for name in sorted(tensors)])


def test_a_deployed_federation_learns_what_the_simulated_one_does(
    make: Callable[..., Federation], tmp_path: Path
) -> None:
    federation = make()
    server = federation.server()
    clients = [federation.warm_client(name) for name in SITES]
    assert server.wait() == 0, server.stderr
    assert "the base model at 127.0.0.1:" in server.stderr
    for client in clients:
        assert client.wait() == 0, client.stderr
        assert "Traceback" not in client.stderr
    summary = read_summary(federation.run)
    expected = adapter_of(federation.simulate(tmp_path))
    # Requests of several sites share a batch, which changes the last digits of a gradient, and
    # with them here and there how a value is rounded to an integer.
    np.testing.assert_allclose(adapter_of(federation.run), expected, atol=5e-3)
    assert np.abs(expected).max() > 0.1
    trained = len(SITES) * ROUNDS * STEPS * BATCH
    assert summary["cut"]["examples"] == trained
    simulated = read_summary(tmp_path / "run")["cut"]
    assert summary["cut"]["tokens"] == simulated["tokens"]
    assert summary["cut"]["bytes_up"] == simulated["bytes_up"]
    assert summary["final"]["accuracy"] == pytest.approx(
        read_summary(tmp_path / "run")["final"]["accuracy"], abs=0.051
    )


def test_embeddings_leave_a_site_only_if_its_policy_lets_them(
    make: Callable[..., Federation],
) -> None:
    federation = make()
    file = federation.site(SITES[0]) / "client.toml"
    file.write_text(file.read_text().replace("max-token-epsilon = inf\n", ""))
    federation.server()
    process = federation.warm_client(SITES[0])
    said = "refused: this site's policy.max-token-epsilon does not allow embeddings that go to"
    wait_until(lambda: said in process.stderr, "a refusal")


def test_a_site_adds_the_noise_that_the_federation_wants(make: Callable[..., Federation]) -> None:
    federation = make(split={"clip": 0.5, "eta": 20.0, "activations": "float32"})
    files = SiteFiles.read(federation.site(SITES[0]) / "client.toml")
    site = load_questions(files)
    seen: list[np.ndarray] = []

    class Watched(AnsweringDecoder):
        def scores(self, embeddings: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            seen.append(embeddings.detach().numpy().copy())
            return super().scores(embeddings, lengths)

    base, config = CausalBase(files.federation.base.path), files.federation
    decoder = Watched(base, config.data.labels)
    terms = terms_of(decoder, config.digest, "float32")
    host, port = files.base_server.split(":")
    tls = tls_of(federation.folder / "server-keys")
    adapter = np.zeros(site.trainer.manifest.size, np.float32)
    rows = np.arange(BATCH)
    with SplitServer(decoder, terms, files.members().roster, host, int(port), tls):
        for _ in range(2):
            plan = LocalPlan(iter([rows]), iter([0.0]), 0)
            site.trainer.train(adapter, site.train, plan)
    first, second = seen
    counted = np.abs(first).sum(-1) > 0
    # Two drawings at one point: each has a length of Gamma(64, 1/20), 3.2 on average, in a
    # direction of its own, so that their squares add up.
    apart = np.linalg.norm(first - second, axis=-1)[counted]
    assert np.sqrt(np.mean(apart**2)) == pytest.approx(3.2 * np.sqrt(2), rel=0.1)
    assert np.linalg.norm(first[counted], axis=-1).mean() == pytest.approx(3.2, rel=0.1)


@pytest.mark.parametrize("kind", ["gray box", "ladder"])
def test_states_cross_a_deployed_cut_too(
    make: Callable[..., Federation], tmp_path: Path, kind: str
) -> None:
    federation = make(
        adapter={"kind": "nano", "rank": 4, "output-rank": 4}
        if kind == "gray box"
        else {"kind": "ladder", "rank": 4, "rungs": 2},
        split={"labels": "client", "activations": "float32"},
    )
    server = federation.server()
    clients = [federation.warm_client(name) for name in SITES]
    assert server.wait() == 0, server.stderr
    for client in clients:
        assert client.wait() == 0, client.stderr
    deployed, expected = adapter_of(federation.run), adapter_of(federation.simulate(tmp_path))
    np.testing.assert_allclose(deployed, expected, atol=5e-3)
    assert np.abs(expected).max() > 0.1
    cut, simulated = (read_summary(run)["cut"] for run in (federation.run, tmp_path / "run"))
    for what in ("examples", "tokens", "bytes_up", "bytes_down"):
        assert cut[what] == simulated[what]
    site = federation.site(SITES[0]) / "client.toml"
    _, command = federation.command("doctor", site, "--json")
    found = {check["check"]: check for check in json.loads(command.stdout)["findings"]}
    assert found["kit"]["numbers"]["adapter_parameters"] == len(expected)


def test_server_and_sites_are_killed_in_the_middle_of_training(
    make: Callable[..., Federation],
) -> None:
    """Nobody's step is lost or counted twice: requests to the base model are asked again."""
    federation = make(train={"steps": 60, "batch-size": BATCH, "lr": 0.02})
    server = federation.server()
    clients = {name: federation.warm_client(name) for name in SITES}
    for number, victim in ((1, "server"), (2, "site-1")):
        wait_until(lambda n=number: federation.committed() >= n - 1, f"round {number}")
        wait_until(lambda: federation.health().get("stage") == "train", "training")
        if victim == "server":
            server = federation.restart_server(server)
        else:
            clients[victim].kill()
            clients[victim] = federation.warm_client(victim)
    assert server.wait() == 0, server.stderr
    for client in clients.values():
        assert client.wait() == 0, client.stderr
    federation.check_finished()
    assert all(set(SITES) <= set(record["clients"]) for record in read_metrics(federation.run))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("kit", "changed since the kit was made"),
        ("digest", "machine.kit-digest says"),
        ("word", "the kit of the base model has no embedding for"),
    ],
)
def test_a_kit_that_is_not_the_federations_is_refused(
    make: Callable[..., Federation], change: str, said: str
) -> None:
    federation = make()
    name = SITES[0]
    if change == "kit":
        with (federation.folder / "kit" / "connector.safetensors").open("ab") as file:
            file.write(b"?")
    elif change == "digest":
        manifest = federation.folder / "kit" / "kit.json"
        manifest.write_text(manifest.read_text() + " ")
    else:
        words = federation.folder / "words.jsonl"
        words.write_text(json.dumps({"question": "what"}) + "\n")
        file = federation.folder / "federation.toml"
        code, command = federation.command("nano", "kit", file, "-o", "small", "--texts", words)
        assert code == 0, command.stderr
        [digest] = re.findall(r'kit-digest = "(\w+)"', command.stdout)
        client = federation.site(name) / "client.toml"
        text = re.sub(r'kit = ".*"', f'kit = "{federation.folder / "small"}"', client.read_text())
        client.write_text(re.sub(r'kit-digest = ".*"', f'kit-digest = "{digest}"', text))
    process = federation.warm_client(name)
    assert process.wait() == 2
    assert said in process.stderr
    assert "Traceback" not in process.stderr


def test_the_doctor_looks_at_kit_questions_and_the_base_models_port(
    make: Callable[..., Federation],
) -> None:
    federation = make()
    site = federation.site(SITES[0]) / "client.toml"
    code, command = federation.command("doctor", site, "--json")
    found = {check["check"]: check for check in json.loads(command.stdout)["findings"]}
    assert code == 1  # the server does not run
    assert found["kit"]["status"] == "ok", found["kit"]
    assert found["kit"]["numbers"]["adapter_parameters"] == 2 * (2 * 64 * 4 + 4 + 64)
    assert found["policy"]["status"] == "ok"
    assert found["questions"]["numbers"]["rows"] == QUESTIONS
    assert found["its server"]["status"] == "problem"
    code, command = federation.command("doctor", federation.folder / "federation.toml", "--json")
    found = {check["check"]: check for check in json.loads(command.stdout)["findings"]}
    assert {found[name]["status"] for name in ("port", "base port", "rows to test on")} == {"ok"}
