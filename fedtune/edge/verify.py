"""`fedtune edge verify`: whether this machine computes from the artifacts what PyTorch did."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from fedtune.edge import artifacts as files
from fedtune.edge.artifacts import EdgeArtifacts, Precision
from fedtune.edge.checks import Check, difference
from fedtune.edge.devices import Runtime, check_files, open_engine
from fedtune.edge.engines import Engine, gradient_name
from fedtune.edge.optimizer import Moments, make_optimizer
from fedtune.edge.reference import LEARNING_RATES, MARKS, WEIGHT_DECAY, batch_of
from fedtune.edge.runtime import TRAINING_VERSION, import_runtime
from fedtune.edge.texts import ForwardModel
from fedtune.edge.verify_nano import verify_nano
from fedtune.types import Task

# Largest difference of one value, as a share of the largest one where that is above 1. AdamW
# divides by the root of its second moment, so with an epsilon of 1e-8 it turns the noise of a
# gradient of nearly zero into a step.
LIMITS = {"logits": 1e-5, "loss": 1e-5, "gradient": 1e-5, "sgd": 1e-5, "adamw": 2e-4}
# Rounded weights are another model. Its gradient must still point the same way.
INT8_LIMITS = {"loss": 0.1, "text-classification": 0.35, "causal-lm": 0.5}


def verify(artifacts: EdgeArtifacts, threads: int = 1) -> Iterator[Check]:
    """Compare all that runs here with the reference, one check after the other.

    Raises `ArtifactError` for a file that is not what the manifest says, `ConfigError` if there
    is no ONNX Runtime.
    """
    runtime = import_runtime()
    for name in artifacts.manifest.files:
        artifacts.path(name)
    yield Check(f"SHA-256 of {len(artifacts.manifest.files)} files", 0, 0)
    if artifacts.manifest.cut is None:
        yield from _texts(artifacts, runtime.__version__, threads)
    else:
        yield from verify_nano(artifacts, threads)
    for name in artifacts.manifest.files:
        files.check_file(artifacts.folder / name, artifacts.manifest.files[name])
    yield Check("SHA-256 of all files after training", 0, 0)


def _texts(artifacts: EdgeArtifacts, version: str, threads: int) -> Iterator[Check]:
    """All runtimes that this build has, in all precisions."""
    runtimes: list[Runtime] = ["stepgraph"]
    if version == TRAINING_VERSION:
        runtimes.insert(0, "ort")
    reference = artifacts.reference()
    for precision in get_args(Precision):
        yield from _forward(artifacts, precision, reference, threads)
        for kind in runtimes:
            yield from _names(artifacts, kind, precision)
            folder = check_files(artifacts, kind, precision)
            engine = open_engine(kind, folder, artifacts.tensors, threads, dropout=False)
            task = artifacts.manifest.task
            yield from _training(f"{kind} {precision}", engine, task, precision, reference)


def _names(artifacts: EdgeArtifacts, kind: Runtime, precision: Precision) -> Iterator[Check]:
    """Whether the step graph's tensors are the adapter's, by name and by shape."""
    if kind != "stepgraph":
        return
    graph = artifacts.manifest.graphs[f"{precision}/{files.STEP}"]
    expected = {(t.name, t.shape) for t in artifacts.tensors.tensors}
    inputs = {(value.name, value.shape) for value in graph.inputs[2:-1]}
    outputs = {(value.name, value.shape) for value in graph.outputs[1:]}
    wrong = len(inputs ^ expected) + len(outputs ^ {(gradient_name(n), s) for n, s in expected})
    yield Check(f"{precision}: {len(expected)} adapter tensors by name and shape", wrong, 0)


def _forward(
    artifacts: EdgeArtifacts,
    precision: Precision,
    reference: dict[str, NDArray[np.float32]],
    threads: int,
) -> Iterator[Check]:
    if precision != "float32":
        return
    graph = artifacts.path(f"{precision}/{files.FORWARD}")
    model = ForwardModel(graph, artifacts.tensors, threads)
    found = model.logits(reference["start"], batch_of(reference, 0))
    yield Check(f"{precision}: logits", difference(found, reference["logits"]), LIMITS["logits"])


def _training(
    what: str,
    engine: Engine,
    task: Task,
    precision: Precision,
    reference: dict[str, NDArray[np.float32]],
) -> Iterator[Check]:
    start = reference["start"]
    loss, gradient = engine.gradient(start, batch_of(reference, 0))
    expected, off_loss = reference["gradient"], difference(np.array([loss]), reference["loss"])
    if precision == "int8":
        off = float(np.linalg.norm(gradient - expected) / np.linalg.norm(expected))
        yield Check(f"{what}: loss", off_loss, INT8_LIMITS["loss"])
        yield Check(f"{what}: gradient, relative", off, INT8_LIMITS[task])
        return
    yield Check(f"{what}: loss", off_loss, LIMITS["loss"])
    yield Check(f"{what}: gradient", difference(gradient, expected), LIMITS["gradient"])
    batches = sum(1 for name in reference if name.startswith("ids-"))
    for name, lr in LEARNING_RATES[task].items():
        trained = start.copy()
        moments = Moments.zeros(trained.size)
        optimizer = make_optimizer(name, WEIGHT_DECAY, moments)
        for step in range(1, MARKS[-1] + 1):
            _, gradient = engine.gradient(trained, batch_of(reference, (step - 1) % batches))
            optimizer.step(trained, gradient, lr)
            if step in MARKS:
                off = difference(trained, reference[f"{name}-{step}"])
                yield Check(f"{what}: {name}, {step} steps", off, LIMITS[name])
