"""A site that trains with ONNX Runtime: no torch, no transformers, no onnx."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from fedtune.adapter.parts import parts_of
from fedtune.config import Train
from fedtune.data import TextExamples
from fedtune.deploy.site_files import SiteFiles
from fedtune.deploy.site_training import SiteTraining
from fedtune.edge.artifacts import EdgeArtifacts
from fedtune.edge.devices import fit, make_losses, make_trainer
from fedtune.edge.optimizer import Moments
from fedtune.edge.runtime import import_build
from fedtune.edge.tokens import EdgeTokenizer
from fedtune.edge.trainer import ALL_ROWS, EdgeSettings, MomentStore
from fedtune.errors import ConfigError
from fedtune.files import write_atomic
from fedtune.resources import resident_memory
from fedtune.round.local import record_privacy
from fedtune.train.forward_only import ForwardOnlyTrainer, directions_of
from fedtune.train.private import RecordPrivacy
from fedtune.train.trainer import Trainer


def load(files: SiteFiles, train: TextExamples, test: TextExamples | None) -> SiteTraining:
    """A trainer on the site's artifacts; raises `UsageError`."""
    config, machine = files.federation, files.config.machine
    if machine.runtime == "torch":
        raise ValueError("a site that trains with PyTorch has no artifacts")
    artifacts = open_artifacts(files)
    micro_batch, length = config.train.batch_size, artifacts.manifest.max_length
    tokenizer = EdgeTokenizer(artifacts, length)
    rows = tokenizer.prepare(train)
    if machine.max_memory_mb is not None:
        memory = artifacts.manifest.memory.get(f"{files.step}/{machine.precision}")
        if memory is None:
            raise ConfigError(
                "machine.max-memory-mb: the artifacts do not say what a step takes; build them on "
                "Linux, or leave it out"
            )
        import_build(files.step)  # it is part of what is resident
        left = machine.max_memory_mb * 1e6 - resident_memory()
        longest = int(rows.lengths.max(initial=2))
        micro_batch, fitting = fit(memory, left, micro_batch, longest)
        if fitting < longest:
            tokenizer = EdgeTokenizer(artifacts, fitting)
            rows = tokenizer.prepare(train)
    trainer = _trainer(files, artifacts, micro_batch, len(train))
    micro_batches = f", {micro_batch} at a time" if micro_batch < config.train.batch_size else ""
    how = "without gradients" if files.step == "forward" else machine.runtime
    return SiteTraining(
        trainer,
        rows,
        tokenizer.prepare(test) if test else None,
        f"{how} {machine.precision}{micro_batches}, artifacts {artifacts.digest[:16]}",
        parts_of(config.adapter.private, artifacts.tensors, artifacts.initial()),
    )


def open_artifacts(files: SiteFiles) -> EdgeArtifacts:
    """The site's artifacts, which are of its federation; raises `UsageError`."""
    config, machine = files.federation, files.config.machine
    if config.train.precision != "float32":
        raise ConfigError(
            f'train.precision = {config.train.precision} needs machine.runtime = "torch"'
        )
    artifacts = EdgeArtifacts(files.find(machine.artifacts), machine.artifacts_digest)
    artifacts.check(config)
    return artifacts


def _trainer(
    files: SiteFiles, artifacts: EdgeArtifacts, micro_batch: int, examples: int
) -> Trainer:
    config, machine, step = files.federation, files.config.machine, files.step
    threads = config.train.threads
    if step == "forward":
        if machine.moments:
            raise ConfigError(
                "machine.moments keeps what AdamW remembers, and train.method = forward-only has "
                "no AdamW; leave it out"
            )
        directions = directions_of(config, artifacts.tensors, artifacts.initial())
        losses = make_losses(artifacts, machine.precision, threads, micro_batch, machine.device)
        return ForwardOnlyTrainer(losses, directions, config.train.perturbation)
    settings = edge_settings(config.train, record_privacy(config, examples), micro_batch)
    moments = MomentFile(files.find(machine.moments)) if machine.moments else None
    return make_trainer(
        artifacts, step, machine.precision, threads, settings, moments, machine.device
    )


def edge_settings(
    train: Train, privacy: RecordPrivacy | None = None, micro_batch: int = ALL_ROWS
) -> EdgeSettings:
    """What a federation's configuration says of training, for a device."""
    return EdgeSettings(
        train.optimizer, train.weight_decay, train.max_grad_norm, privacy, micro_batch
    )


class MomentFile(MomentStore):
    """AdamW's moments in a file, from one round to the next and through restarts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self, size: int) -> Moments:
        """What was kept, or zeros; raises `ConfigError` if it is not of this adapter."""
        try:
            found = load_tensors(self._path.read_bytes())
        except FileNotFoundError:
            return Moments.zeros(size)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{self._path}: cannot be read: {error}; remove it") from error
        shapes = {name: (value.shape, value.dtype) for name, value in found.items()}
        vector = ((size,), np.dtype(np.float32))
        if shapes != {"first": vector, "second": vector, "steps": ((1,), np.dtype(np.int64))}:
            raise ConfigError(f"{self._path}: of another adapter; remove it")
        return Moments(found["first"], found["second"], int(found["steps"][0]))

    def save(self, moments: Moments) -> None:
        """Keep these; raises `OSError`."""
        tensors = {"first": moments.first, "second": moments.second}
        write_atomic(
            self._path, save_tensors(tensors | {"steps": np.array([moments.steps], np.int64)})
        )
