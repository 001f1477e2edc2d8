"""A trainer from artifacts, for one runtime and one precision, within a budget of memory."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from fedtune.edge import artifacts as files
from fedtune.edge.artifacts import EdgeArtifacts, Memory, Precision
from fedtune.edge.engines import Engine, StepGraphEngine, TrainingEngine
from fedtune.edge.texts import EdgeLosses, ForwardModel, TextGradients
from fedtune.edge.trainer import EdgeSettings, EdgeTrainer, MomentStore
from fedtune.errors import ConfigError
from fedtune.types import Manifest

Runtime = Literal["ort", "stepgraph"]
Step = Literal["ort", "stepgraph", "forward"]  # what a step runs; forward: without gradients
SHORTEST = 16  # tokens: texts that are cut more say nothing
logger = logging.getLogger(__name__)


def open_engine(
    runtime: Runtime,
    folder: Path,
    manifest: Manifest,
    threads: int,
    dropout: bool,
    device: str = "cpu",
) -> Engine:
    """The engine of a runtime on the graphs in `folder`; raises `ConfigError`."""
    if runtime == "ort":
        graph, checkpoint = folder / files.TRAINING, folder / files.CHECKPOINT
        return TrainingEngine(graph, checkpoint, manifest, threads, dropout, device)
    return StepGraphEngine(folder / files.STEP, manifest, threads, dropout, device)


_FILES: dict[Step, tuple[str, ...]] = {
    "ort": (files.TRAINING, files.CHECKPOINT),
    "stepgraph": (files.STEP,),
    "forward": (),
}


def check_files(artifacts: EdgeArtifacts, step: Step, precision: Precision) -> Path:
    """The folder of a precision, whose files are what they must be; raises `ArtifactError`."""
    for name in (files.FORWARD, *_FILES[step]):
        artifacts.path(f"{precision}/{name}")
    if step == "forward":
        artifacts.path(files.INITIAL)
    return artifacts.folder / precision


def make_trainer(
    artifacts: EdgeArtifacts,
    runtime: Runtime,
    precision: Precision,
    threads: int,
    settings: EdgeSettings,
    moments: MomentStore | None = None,
    device: str = "cpu",
) -> EdgeTrainer:
    """A trainer whose files were checked; raises `ArtifactError` or `ConfigError`."""
    found = artifacts.manifest
    if settings.record_privacy is not None and found.dropout:
        raise ConfigError(
            "privacy.unit = record with adapter.dropout: a device cannot draw each example's "
            "dropout by itself; set adapter.dropout = 0"
        )
    folder = check_files(artifacts, runtime, precision)
    engine = open_engine(runtime, folder, artifacts.tensors, threads, found.dropout > 0, device)
    forward = ForwardModel(folder / files.FORWARD, artifacts.tensors, threads, device)
    model = TextGradients(
        engine, forward, found.base_digest, found.task, found.pad_id, settings.micro_batch
    )
    return EdgeTrainer(artifacts.tensors, model, settings, moments)


def make_losses(
    artifacts: EdgeArtifacts,
    precision: Precision,
    threads: int,
    micro_batch: int,
    device: str = "cpu",
) -> EdgeLosses:
    """What training without gradients needs, on any ONNX Runtime; raises `ArtifactError`."""
    folder = check_files(artifacts, "forward", precision)
    forward = ForwardModel(folder / files.FORWARD, artifacts.tensors, threads, device)
    found = artifacts.manifest
    return EdgeLosses(forward, found.base_digest, found.task, found.pad_id, micro_batch)


def fit(memory: Memory, budget: float, batch_size: int, tokens: int) -> tuple[int, int]:
    """The most rows and tokens of a micro-batch whose step takes at most `budget` bytes.

    Rows are given up first: the same batch in several passes has the same gradient. Only when one
    row is too much, texts are cut. Raises `ConfigError` if nothing fits.
    """
    for rows in range(batch_size, 0, -1):
        if memory.peak(rows, tokens) <= budget:
            return rows, tokens
    for length in range(tokens - 1, SHORTEST - 1, -1):
        if memory.peak(1, length) <= budget:
            logger.warning(
                "texts are cut to %d tokens instead of %d, to fit into max-memory-mb",
                length,
                tokens,
            )
            return 1, length
    least = memory.peak(1, min(SHORTEST, tokens))
    raise ConfigError(
        f"one text of {min(SHORTEST, tokens)} tokens takes {least / 2**20:.0f} MiB beside what the "
        f"process has already, max-memory-mb leaves {max(budget, 0) / 2**20:.0f} MiB; raise it, or "
        'set precision = "int8"'
    )
