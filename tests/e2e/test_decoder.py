"""A causal language model is trained by a federation from the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployed import Federation
from e2e_helpers import Launcher, read_metrics, read_summary
from safetensors.numpy import load_file

ROUNDS = 2


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory, icd_rows: Any) -> Path:
    """A file of texts and nothing else."""
    file = tmp_path_factory.mktemp("notes") / "notes.jsonl"
    texts = [row["text"] for row in icd_rows[0]]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.fixture
def finished(launcher: Launcher, tiny_decoder: Path, notes: Path) -> Path:
    """The folder of a finished, masked run."""
    sets = ("base.task=causal-lm", "base.max-length=48", "train.steps=5", "train.lr=0.01")
    arguments = [part for override in sets for part in ("--set", override)]
    code, command = launcher.run(
        *("simulate", "--data", notes, "--base", tiny_decoder, "--clients", "4"),
        *("--rounds", str(ROUNDS), "--workers", "2", *arguments, "--out", "run"),
    )
    assert code == 0, command.stderr
    assert "Warning" not in command.stderr
    return launcher.folder / "run"


def test_what_a_run_learns_loads_into_plain_transformers(
    launcher: Launcher, finished: Path, tiny_decoder: Path, notes: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    summary, metrics = read_summary(finished), read_metrics(finished)
    assert summary["masked"] is True
    assert summary["labels"] == []
    assert summary["final"]["accuracy"] is None
    assert summary["best"]["round"] == ROUNDS
    assert [row["round"] for row in metrics] == [1, 2]
    assert metrics[1]["loss"] < metrics[0]["loss"]
    assert "together reach a loss of" in (finished / "report.html").read_text()

    code, command = launcher.run("eval", finished, "--data", notes, "--json")
    assert code == 0, command.stderr
    said = json.loads(command.stdout)
    assert said["perplexity"] == pytest.approx(math.exp(said["loss"]))

    # Without fedtune: the base model, peft, and transformers' own loss of each text.
    plain = AutoModelForCausalLM.from_pretrained(tiny_decoder)
    tuned = PeftModel.from_pretrained(plain, finished / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    losses = []
    with torch.no_grad():
        for line in notes.read_text().splitlines():
            row = tokenizer(json.loads(line)["text"])["input_ids"][:48]
            ids = torch.tensor([row + [tokenizer.eos_token_id] * (len(row) < 48)])
            losses.append(float(tuned(input_ids=ids, labels=ids).loss))
    assert said["loss"] == pytest.approx(np.mean(losses), rel=1e-5)

    code, command = launcher.run("export", finished, "--out", "merged")
    assert code == 0, command.stderr
    merged = AutoModelForCausalLM.from_pretrained(launcher.folder / "merged")
    with torch.no_grad():
        expected = tuned(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_workstations_and_a_device_train_a_decoder_together(
    make_federation: Callable[..., Federation],
    decoder_artifacts: tuple[Path, Any, Any],
    tiny_decoder: Path,
    tmp_path: Path,
) -> None:
    """Two sites with PyTorch, one with ONNX Runtime; the agreed files name no labels."""
    made = make_federation(
        tables={
            "base": {"path": str(tiny_decoder), "task": "causal-lm", "max-length": 40},
            "adapter": {"rank": 4},
            "data": {"labels": []},
            "rounds": {"count": ROUNDS},
            # Finely rounded, so that what differs is the training.
            "update": {"clip": 20.0, "bits": 24},
        },
    )
    made.set_machine("clinic-2", runtime="stepgraph", artifacts=str(decoder_artifacts[0]))
    server = made.server()
    clients = [made.warm_client(name) for name in made.sites]
    assert server.wait() == 0, server.stderr
    for client in clients:
        assert client.wait() == 0, client.stderr
    assert "stepgraph float32" in clients[2].stderr
    summary = read_summary(made.run)
    assert (summary["status"], summary["labels"]) == ("finished", [])
    assert summary["final"]["accuracy"] is None
    simulated = made.simulate(tmp_path)  # with PyTorch at all three
    found, expected = (
        load_file(run / "adapter" / "adapter_model.safetensors") for run in (made.run, simulated)
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() < 2e-4, name
    assert read_summary(simulated)["final"]["loss"] == pytest.approx(
        summary["final"]["loss"], rel=1e-3
    )
