"""A causal language model is trained by a federation from the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from e2e_helpers import Launcher, read_metrics, read_summary

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
