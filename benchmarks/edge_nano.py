"""NanoAdapters on a device beside PyTorch: bytes, memory and time of the client's own work.

    python benchmarks/edge_nano.py [--python DEVICE]

SmolLM2's width (576), rank 32, the questions of easy-VQA. Of the base model only the kit is there;
what stands for it at the cut answers at once with a gradient of random numbers, so that nothing but
the client is measured: its imports, 64 images through the encoder, and steps of 8 questions. Each
measurement is a process of its own; the two take turns. Peak memory is the kernel's count (VmHWM).
`--python` is that of an environment made by client/requirements.edge-plain.txt and
requirements.edge-nano.txt. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray

from fedtune.config import PRESETS, read_toml
from fedtune.edge.runtime import import_runtime
from fedtune.resources import peak_memory
from fedtune.train.trainer import LocalPlan

ROOT = Path(__file__).resolve().parents[1]
IMAGES, ROWS, WARM, STEPS = 64, 8, 5, 50
MB = 1e6


class AtOnce:
    """Stands for the base model: losses of zero, and a gradient of random numbers."""

    def differentiate(
        self, embeddings: NDArray[np.float32], lengths: NDArray[np.int64], labels: object
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See `RemoteBase.differentiate`."""
        counts = np.arange(embeddings.shape[1]) < lengths[:, None]
        slope = np.random.default_rng(0).normal(0, 1e-3, embeddings.shape) * counts[..., None]
        return np.zeros(len(lengths), np.float32), slope.astype(np.float32)


def main() -> None:
    """Measure both and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for _ in range(args.repeats):
            for kind, python in (("torch", Path(sys.executable)), ("stepgraph", args.python)):
                found[kind].append(_measured(python, kind, folder))
        for part in ("kit", "artifacts"):
            sizes = {f: f.stat().st_size for f in (folder / part).rglob("*") if f.is_file()}
            print(f"{part}: {sum(sizes.values()) / MB:.1f} MB")
            for file, size in sorted(sizes.items(), key=lambda item: -item[1])[:4]:
                print(f"    {file.relative_to(folder / part)}: {size / MB:.2f} MB")
    for key in ("imported", "prepared", "trained", "image ms", "step ms"):
        torch, device = (
            statistics.median(run[key] for run in found[kind]) for kind in ("torch", "stepgraph")
        )
        print(f"{key:>10}: torch {torch:8.2f}, stepgraph {device:8.2f}, ratio {device / torch:.2f}")


def prepare(folder: Path) -> None:
    """A federation's configuration and its questions, a kit, and artifacts."""
    from fedtune.base.causal import CausalBase
    from fedtune.base.connector import Pretraining
    from fedtune.base.kit import write_kit
    from fedtune.base.vision import VisionEncoder
    from fedtune.config import load_config
    from fedtune.data import PartitionSpec
    from fedtune.data.easy_vqa import load_easy_vqa
    from fedtune.data.questions import Captions
    from fedtune.edge.build.nano import build_nano
    from fedtune.simulation.vision import train_connector
    from fedtune.train.question_rows import PROMPT

    data = load_easy_vqa(partition=PartitionSpec("iid"), clients=1, seed=0)
    federation = read_toml(PRESETS / "vqa.toml")
    federation["data"] = {"labels": list(data.answers)}
    base, connector = CausalBase(federation["base"]["path"]), folder / "connector.safetensors"
    few = Captions(data.public.files[:16], data.public.words[:16])
    train_connector(base, VisionEncoder(), few, connector, Pretraining(steps=5))
    federation["base"]["connector"] = str(connector)
    (folder / "federation.toml").write_text(tomli_w.dumps(federation))
    asked = data.clients[0].train
    texts = [PROMPT.format(question=question) for question in {*asked.questions}]
    kit = write_kit(folder / "kit", base, connector, texts)
    build_nano(load_config(folder / "federation.toml"), kit, folder / "artifacts", print)
    _, first = np.unique(asked.images, return_index=True)  # a question about each image
    rows = [
        {
            "question": asked.questions[row],
            "answer": data.answers[asked.labels[row]],
            "image": str(asked.files[asked.images[row]]),
        }
        for row in first[:IMAGES]
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(kind: str, folder: Path) -> dict[str, float]:
    """Import, encode the images, and train; MB of memory after each, and milliseconds."""
    import_site = {"torch": _torch, "stepgraph": _stepgraph}[kind]
    make = import_site(folder)
    found = {"imported": peak_memory() / MB}
    started = time.perf_counter()
    trainer, rows, start = make()
    found["image ms"] = 1000 * (time.perf_counter() - started) / IMAGES
    found["prepared"] = peak_memory() / MB
    batches = [np.arange(ROWS) + ROWS * (step % (IMAGES // ROWS)) for step in range(WARM + STEPS)]
    times = []
    for batch in batches:
        started = time.perf_counter()
        trainer.train(start, rows, LocalPlan(iter([batch]), iter([1e-3]), 0))
        times.append(1000 * (time.perf_counter() - started))
    found["trained"] = peak_memory() / MB
    return found | {"step ms": float(np.median(times[WARM:]))}


def _torch(folder: Path) -> Callable[[], tuple[Any, Any, Any]]:
    import torch

    from fedtune.base.kit import ClientKit
    from fedtune.config import load_config
    from fedtune.data.question_files import read_questions
    from fedtune.simulation.job import torch_settings
    from fedtune.simulation.vision import VisionClient
    from fedtune.train.cut import AcrossCut
    from fedtune.train.torch_trainer import TorchTrainer

    torch.set_num_threads(1)
    config = load_config(folder / "federation.toml")

    def make() -> tuple[Any, Any, Any]:
        kit, remote = ClientKit(folder / "kit"), AcrossCut(AtOnce())
        longest = kit.manifest.max_tokens
        half = VisionClient(config, kit.tokenizer(), kit.table(), longest, kit.connector, remote)
        trainer = TorchTrainer(half.adapter, half.task, "", torch_settings(config.train))
        examples = read_questions(folder / "train.jsonl", config.data.labels)
        return trainer, half.prepare(examples), half.adapter.read()

    return make


def _stepgraph(folder: Path) -> Callable[[], tuple[Any, Any, Any]]:
    from fedtune.config import load_config
    from fedtune.data.question_files import read_questions
    from fedtune.deploy.edge_site import edge_settings
    from fedtune.deploy.edge_vision_site import (
        EdgeArtifacts,
        EdgeTrainer,
        ImageReader,
        NanoQuestions,
        QuestionReader,
        open_half,
    )

    import_runtime()
    config = load_config(folder / "federation.toml")

    def make() -> tuple[Any, Any, Any]:
        artifacts = EdgeArtifacts(folder / "artifacts")
        model = NanoQuestions(open_half(artifacts, 1), AtOnce(), "server", "")
        trainer = EdgeTrainer(artifacts.tensors, model, edge_settings(config.train))
        examples = read_questions(folder / "train.jsonl", config.data.labels)
        rows = QuestionReader(artifacts, ImageReader(artifacts, 1)).prepare(examples)
        return trainer, rows, np.zeros(artifacts.tensors.size, np.float32)

    return make


def _measured(python: Path, kind: str, folder: Path) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / kind)}
    for file in (folder / kind).rglob("*.safetensors"):
        file.unlink()  # features of the last time
    command = [str(part) for part in (python, __file__, "--run", kind, folder)]
    return json.loads(subprocess.check_output(command, env=environment, text=True))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        print(json.dumps(run(sys.argv[2], Path(sys.argv[3]))))
    else:
        main()
