"""A federation that trains against an emulator of its base model, simulated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_helpers import Launcher, read_summary
from vqa_files import write_question_clients

SETS = (
    *("train.steps=6", "train.batch-size=4", "adapter.rank=4", "data.min-examples=1"),
    *("update.clip=unset", "update.bits=unset", "secagg.enabled=false", "train.lr=0.02"),
)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_question_clients(tmp_path_factory.mktemp("questions") / "sites")


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    made = Launcher(tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("outputs"))
    yield made
    made.end_all()


@pytest.fixture(scope="module")
def simulated(launcher: Launcher, deep_decoder: Path, questions: Path) -> Path:
    """A run with half of the decoder's six layers."""
    flags = [part for override in SETS for part in ("--set", override)]
    code, command = launcher.run(
        *("simulate", "--preset", "vqa", "--data", questions, "--base", deep_decoder),
        *("--rounds", "2", "--workers", "2", "--out", "run", *flags),
        *("--set", "base.placement=emulator", "--set", "emulator.layers=3"),
    )
    assert code == 0, command.stderr
    return launcher.folder / "run"


def test_it_runs(simulated: Path) -> None:
    s = read_summary(simulated)
    print(json.dumps({k: s[k] for k in ("final", "references", "cut", "adapter")}, indent=1))
