"""How much memory a training step takes, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np

from fedtune.edge.artifacts import FORWARD, Memory, Precision
from fedtune.edge.devices import Step, open_engine
from fedtune.edge.runtime import import_build
from fedtune.edge.texts import ForwardModel
from fedtune.errors import ArtifactError
from fedtune.resources import forget_peak_memory, peak_memory, resident_memory
from fedtune.train.texts import Batch
from fedtune.types import Float32Vector, Manifest, Task

# Rows and tokens of the steps that are measured.
_STEPS = ((1, 16), (8, 32), (1, 192), (8, 96))


def measure(out: Path, task: Task, manifest: Manifest, longest: int) -> dict[str, Memory]:
    """`Memory` of each runtime and precision, by `RUNTIME/PRECISION`.

    `forward/PRECISION` is that of training without gradients, by any runtime.

    Empty on systems that do not say what a process holds. Raises `ArtifactError` if a step fails.
    """
    if not resident_memory():
        return {}
    return {
        f"{what}/{precision}": _fit(out, task, what, precision, manifest, longest)
        for what in get_args(Step)
        for precision in get_args(Precision)
    }


def _fit(
    out: Path, task: Task, what: Step, precision: Precision, manifest: Manifest, longest: int
) -> Memory:
    steps = [(rows, min(tokens, longest)) for rows, tokens in _STEPS]
    shapes = [[tensor.name, list(tensor.shape)] for tensor in manifest.tensors]
    asked = json.dumps([str(out / precision), task, what, shapes, steps])
    process = subprocess.run(  # this interpreter, this package
        [sys.executable, "-m", "fedtune.edge.build.memory"],
        input=asked,
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise ArtifactError(
            f"a training step failed in {what} {precision}: "
            f"{' '.join(process.stderr.strip().splitlines()[-1:])}"
        )
    found = np.array(json.loads(process.stdout), float)
    terms = np.array([[1, rows * tokens, rows * tokens**2] for rows, tokens in steps], float)
    # What is too small to be seen beside the rest can come out below zero.
    factors = np.maximum(np.linalg.lstsq(terms, found)[0], 0.0)
    above = float((found - terms @ factors).max())
    fixed, per_token, per_pair = (float(factor) for factor in factors)
    return Memory(fixed=fixed + max(above, 0.0), per_token=per_token, per_pair=per_pair)


def main() -> None:
    """Print what each step takes, in bytes above what there was before the model was loaded."""
    folder, task, what, shapes, steps = json.loads(sys.stdin.read())
    manifest = Manifest.of((name, tuple(shape)) for name, shape in shapes)
    # As on a device: where torch is, ONNX Runtime's training build imports it.
    sys.modules["torch"] = None  # type: ignore[assignment]  # what makes an import fail
    import_build(what)
    before = resident_memory()
    step = _open(what, Path(folder), manifest)
    adapter = np.zeros(manifest.size, np.float32)
    found = []
    for rows, tokens in steps:
        ids = np.ones((rows, tokens), np.int64)
        labels = np.zeros(rows if task == "text-classification" else rows * tokens, np.int64)
        batch = Batch(ids, ids, labels)
        forget_peak_memory()
        for _ in range(2):  # the second one finds the first one's gradients still there
            step(adapter, batch)
        found.append(peak_memory() - before)
    print(json.dumps(found))


def _open(what: Step, folder: Path, manifest: Manifest) -> Callable[[Float32Vector, Batch], object]:
    if what == "forward":
        return ForwardModel(folder / FORWARD, manifest, 1).logits
    return open_engine(what, folder, manifest, 1, dropout=False).gradient


if __name__ == "__main__":
    main()
