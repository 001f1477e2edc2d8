"""One kind of training step, or of inference, in a process of its own, for `edge.py`.

    python benchmarks/edge_step.py ort/int8 ARTIFACTS

Prints JSON: the median milliseconds of a step, and the process's peak in MiB. Nothing is imported
that the measured kind does not need.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROWS, TOKENS, WARM, STEPS, THREADS = 8, 64, 2, 10, 2
FORWARD_ONLY = ("train.method=forward-only", "train.optimizer=sgd")


def measure(kind: str, artifacts: Path) -> dict[str, float]:
    """Train, or infer, on one batch; median milliseconds of a step, and the peak in MiB."""
    from fedtune.resources import peak_memory
    from fedtune.train.texts import TokenizedTexts
    from fedtune.train.trainer import LocalPlan

    rng = np.random.default_rng(0)
    data = TokenizedTexts.of(
        rng.integers(1000, 20_000, (ROWS, TOKENS)).tolist(), rng.integers(0, 20, ROWS)
    )
    rows = np.arange(ROWS)
    trainer = make(kind, artifacts)
    adapter = np.zeros(trainer.manifest.size, np.float32)  # or what stands for it
    times = []
    for _ in range(WARM + STEPS):
        started = time.perf_counter()
        if kind.startswith("inference"):
            trainer.evaluate(adapter, data)
        else:
            trainer.train(adapter, data, LocalPlan(iter([rows]), iter([1e-3]), 0))
        times.append(1000 * (time.perf_counter() - started))
    peak = peak_memory() / 2**20  # first: what computes a median is imported when it is asked for
    return {"ms": float(np.median(times[WARM:])), "peak": peak}


def make(kind: str, artifacts: Path) -> Any:
    """The trainer of one kind."""
    if kind == "torch":
        import torch

        from fedtune.config import load_config
        from fedtune.simulation.job import TextModel, torch_settings
        from fedtune.train.torch_trainer import TorchTrainer

        torch.set_num_threads(THREADS)
        config = load_config(artifacts.parent / "federation.toml")
        model = TextModel(config, len(config.data.labels))
        settings = torch_settings(config.train)
        return TorchTrainer(model.adapter, model.task, model.base.digest, settings)
    from fedtune.edge.artifacts import EdgeArtifacts
    from fedtune.edge.devices import make_losses, make_trainer
    from fedtune.edge.trainer import EdgeSettings, EdgeTrainer

    runtime, _, precision = kind.partition("/")
    found = EdgeArtifacts(artifacts)
    chosen: Any = precision
    if runtime == "inference":
        without_gradients: Any = make_losses(found, chosen, THREADS, EdgeSettings().micro_batch)
        return EdgeTrainer(found.tensors, without_gradients, EdgeSettings())
    if runtime == "forward-only":
        from fedtune.config import load_config
        from fedtune.train.forward_only import ForwardOnlyTrainer, directions_of

        config = load_config(artifacts.parent / "federation.toml", FORWARD_ONLY)
        directions = directions_of(config, found.tensors, found.initial())
        losses = make_losses(found, chosen, THREADS, ROWS)
        return ForwardOnlyTrainer(losses, directions, config.train.perturbation)
    step: Any = runtime
    return make_trainer(found, step, chosen, THREADS, EdgeSettings())


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
