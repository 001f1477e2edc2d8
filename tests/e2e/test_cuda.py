"""The preset for two rounds on CUDA, where there is a device, against the same on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

# Asked of NVML, so that this process stays free of a CUDA context that workers cannot share.
NO_CUDA = torch.cuda.device_count() == 0


def simulate(out: Path, device: str, precision: str = "float32") -> dict[str, float]:
    command = [sys.executable, "-m", "fedtune.cli", "simulate", "--json", "--rounds", "2"]
    command += ["--set", f"train.device={device}", "--set", f"train.precision={precision}"]
    done = subprocess.run([*command, "--out", str(out)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)["final"]


def vector(out: Path) -> np.ndarray:
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


@pytest.mark.cuda
@pytest.mark.skipif(NO_CUDA, reason="no CUDA device here")
def test_cuda_and_cpu_learn_the_same(tmp_path: Path) -> None:
    scores = {
        name: simulate(tmp_path / name, device, precision)
        for name, device, precision in (
            ("cpu", "cpu", "float32"),
            ("cuda", "cuda", "float32"),
            ("bf16", "cuda", "bf16"),
        )
    }
    cpu, cuda = vector(tmp_path / "cpu"), vector(tmp_path / "cuda")
    # Float rounding grows through 60 steps of AdamW; the direction of travel is the same.
    assert np.linalg.norm(cpu - cuda) < 0.05 * np.linalg.norm(cpu)
    assert scores["cuda"]["accuracy"] == pytest.approx(scores["cpu"]["accuracy"], abs=0.02)
    assert scores["bf16"]["accuracy"] == pytest.approx(scores["cpu"]["accuracy"], abs=0.05)
