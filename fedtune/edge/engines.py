"""What differentiates a model on a device: two runtimes behind one protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedtune.edge.runtime import (
    import_runtime,
    import_training,
    open_session,
    providers_of,
    session_options,
)
from fedtune.errors import ConfigError
from fedtune.train.texts import Batch
from fedtune.types import Float32Vector, Manifest


class Engine(Protocol):
    """A frozen model of which the adapter's gradient can be had."""

    def gradient(self, adapter: Float32Vector, batch: Batch) -> tuple[float, Float32Vector]:
        """The mean loss of a batch, and its gradient by the adapter, float32 `[manifest.size]`."""

    def reseed(self, seed: int) -> None:
        """Begin the stream of dropout masks that belongs to `seed`."""


class TrainingEngine:
    """ONNX Runtime's training build (`onnxruntime-training` 1.19.2)."""

    def __init__(
        self,
        graph: Path,
        checkpoint: Path,
        manifest: Manifest,
        threads: int,
        dropout: bool,
        device: str = "cpu",
    ) -> None:
        """Raises `ConfigError` if this is another build, or does not load the files."""
        self._api = import_training()
        providers_of(device)
        self._device = "cpu" if device == "auto" else device
        self._graph, self._checkpoint, self._manifest = graph, checkpoint, manifest
        self._threads, self._dropout = threads, dropout
        self._open()

    def _open(self) -> None:
        try:
            self._state: Any = self._api.CheckpointState.load_checkpoint(str(self._checkpoint))
            self._module: Any = self._api.Module(
                str(self._graph),
                self._state,
                device=self._device,
                session_options=session_options(self._threads),
            )
        except Exception as error:  # of a dozen kinds without a common base
            raise ConfigError(
                f"{self._graph}: ONNX Runtime does not load it: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error
        self._module.train()

    def gradient(self, adapter: Float32Vector, batch: Batch) -> tuple[float, Float32Vector]:
        """See `Engine.gradient`."""
        parameters = self._state.parameters
        for name, value in self._manifest.split(adapter).items():
            parameters[name] = value
        self._module.lazy_reset_grad()
        loss = float(self._module(batch.ids, batch.mask, batch.labels))
        # Each is a view of memory that the next pass writes: `join` copies it.
        gradients = {t.name: parameters[t.name].grad for t in self._manifest.tensors}
        return loss, self._manifest.join(gradients)

    def reseed(self, seed: int) -> None:
        """See `Engine.reseed`."""
        if self._dropout:
            # Generators are seeded when a session is opened, and not again.
            import_runtime().set_seed(seed % 2**31)
            self._open()


class StepGraphEngine:
    """A graph of ordinary operators that gives loss and gradients, on any ONNX Runtime."""

    def __init__(
        self, graph: Path, manifest: Manifest, threads: int, dropout: bool, device: str = "cpu"
    ) -> None:
        """Raises `ConfigError` if the graph does not load."""
        self._graph, self._manifest = graph, manifest
        self._threads, self._dropout, self._device = threads, dropout, device
        self._open()
        self._outputs = ["loss", *(gradient_name(t.name) for t in manifest.tensors)]

    def gradient(self, adapter: Float32Vector, batch: Batch) -> tuple[float, Float32Vector]:
        """See `Engine.gradient`."""
        loss, *gradients = self._session.run(
            self._outputs, feeds(batch, adapter, self._manifest) | {"labels": batch.labels}
        )
        return float(loss), np.concatenate([gradient.reshape(-1) for gradient in gradients])

    def reseed(self, seed: int) -> None:
        """See `Engine.reseed`."""
        if self._dropout:
            # Generators are seeded when a session is opened, and not again.
            import_runtime().set_seed(seed % 2**31)
            self._open()

    def _open(self) -> None:
        self._session = open_session(self._graph, self._threads, self._device, prepack=True)


def feeds(batch: Batch, adapter: Float32Vector, manifest: Manifest) -> dict[str, Any]:
    """What a graph takes that has the adapter's tensors as inputs."""
    return {"input_ids": batch.ids, "attention_mask": batch.mask, **manifest.split(adapter)}


def gradient_name(tensor: str) -> str:
    """The output of a step graph that is the gradient by this tensor."""
    return f"{tensor}.grad"
