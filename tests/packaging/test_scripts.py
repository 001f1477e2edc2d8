"""The shell scripts parse; what the check on ARM computes is right, and it notices what is not.

The check itself downloads an operating system and is run by hand.
"""

from __future__ import annotations

import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SHELL = sorted(SCRIPTS.glob("*.sh"))


@pytest.fixture
def check(tmp_path: Path) -> dict[str, Any]:
    """The names of `check_aarch64.py`, with a graph built in `tmp_path`."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    names = runpy.run_path(str(SCRIPTS / "check_aarch64.py"))
    names["build"](tmp_path)
    return names


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_bash_reads_the_script(script: Path) -> None:
    found = subprocess.run(
        ["bash", "-n", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="there is no shellcheck here")
@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shellcheck_has_no_complaint(script: Path) -> None:
    found = subprocess.run(
        ["shellcheck", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("arguments", [["--speed", "high"], ["--root"]])
def test_a_wrong_option_is_named(arguments: list[str]) -> None:
    found = subprocess.run(
        [SCRIPTS / "check_aarch64.sh", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (found.returncode, found.stdout) == (1, "")
    assert len(found.stderr.splitlines()) == 1
    assert arguments[0] in found.stderr


def test_the_gradients_of_the_reference_are_its_slopes(
    check: dict[str, Any], tmp_path: Path
) -> None:
    with np.load(tmp_path / "arrays.npz", allow_pickle=False) as file:
        arrays = {name: values.astype(np.float64) for name, values in file.items()}
    arrays |= {name: arrays[name].astype(np.int64) for name in ("input_ids", "labels")}
    gradients = check["reference"](arrays)
    random = np.random.default_rng(1)
    for name in ("down", "up", "head"):
        direction = random.normal(size=arrays[name].shape)
        width = 1e-5
        ahead, behind = (
            check["reference"](arrays | {name: arrays[name] + side * direction})["loss"]
            for side in (width, -width)
        )
        expected = (gradients[f"{name}_gradient"] * direction).sum()
        assert (ahead - behind) / (2 * width) == pytest.approx(expected, rel=1e-6)


def test_a_runtime_that_computes_wrongly_fails_the_check(
    check: dict[str, Any], tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    assert check["step"](tmp_path).startswith("loss ")
    model = onnx.load(tmp_path / "step.onnx")
    (node,) = [node for node in model.graph.node if node.output[0] == "up_gradient"]
    node.op_type = "Identity"
    node.input[:] = ["up"]
    onnx.save(model, tmp_path / "step.onnx")
    with pytest.raises(SystemExit, match="up_gradient"):
        check["step"](tmp_path)
