"""NanoAdapters, gray boxes and ladders on easy-VQA and SmolLM2: what is learned for what passes.

    python benchmarks/side_tuning.py
    python benchmarks/side_tuning.py --steps 20 --test 50 --kinds ladder

Each is trained without a federation, behind a cut within one process, in float16. NanoAdapters and
gray boxes send an example for each step that it is in. Ladders get: as many steps, each example
once; the same examples again and again; and as many examples as the server computes passes for
the others, where a backward pass counts as one. Then, for the test questions, how many answers the
server of the trained gray box reads off the gradient by the state. Some minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# Before numpy: two pools of threads on few cores wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import torch
from torch.nn import functional

from fedtune.config import load_preset
from fedtune.data import PartitionSpec
from fedtune.data.easy_vqa import load_easy_vqa
from fedtune.data.questions import FederatedQuestions
from fedtune.simulation.job import torch_settings
from fedtune.simulation.vision import VisionModel
from fedtune.train.batches import learning_rate, plan_batches
from fedtune.train.questions import EncodedQuestions
from fedtune.train.torch_trainer import TorchTrainer
from fedtune.train.trainer import LocalPlan

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from adversary import label_inference

KINDS: dict[str, list[str]] = {
    "ladder": ["adapter.kind=ladder"],
    "nano": [],
    "gray box": ["adapter.output-rank=32", "split.labels=client"],
}
AGAIN = 20  # times that a ladder goes through what it has


def main() -> None:
    """Train and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--test", type=int, default=150, help="questions")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = load_easy_vqa(partition=PartitionSpec("iid"), clients=1, seed=args.seed)
    figures: list[dict[str, Any]] = []
    for kind in args.kinds:
        figures += measure(kind, data, args.steps, args.batch, args.test, args.seed)
    for row in figures:
        print(json.dumps(row))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


def measure(
    kind: str, data: FederatedQuestions, steps: int, batch: int, test: int, seed: int
) -> list[dict[str, Any]]:
    """Rows of the table for this kind of adapter."""
    model = model_of(kind, data, seed)
    train, tested = (
        model.prepare(data.clients[0].train),
        model.prepare(data.test.select(range(test))),
    )
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(train))
    ways = {"each example once": (steps, steps)}
    if kind == "ladder":
        ways["the same examples again"] = (steps, AGAIN * steps)
        ways["as many passes"] = (2 * steps, AGAIN * steps)
    found = []
    trainer = trainer_of(model, kind)
    start = model.adapter.read()
    base = trainer.evaluate(start, tested).accuracy
    for words, (seen, taken) in ways.items():
        before, started = model.meter.traffic, time.perf_counter()
        rows = train.select(order[: seen * batch])
        trained = trainer.train(start, rows, plan(rows, taken, batch, seed)).adapter
        passed, seconds = model.meter.traffic, time.perf_counter() - started
        accuracy = trainer.evaluate(trained, tested).accuracy
        found.append(
            {
                "kind": kind,
                "way": words,
                "parameters": model.adapter.manifest.size,
                "examples": seen * batch,
                "steps": taken,
                "asked": passed.trained - before.trained,
                "up": passed.up - before.up,
                "down": passed.down - before.down,
                "base": base,
                "accuracy": accuracy,
                "seconds": round(seconds),
            }
        )
        print(found[-1], file=sys.stderr, flush=True)
    if kind == "gray box":
        model.adapter.write(trained)
        found.append({"kind": kind, **attack(model, tested)})
    return found


def model_of(kind: str, data: FederatedQuestions, seed: int) -> VisionModel:
    """The preset's model with this kind of adapter."""
    config = load_preset("vqa", [f"seed={seed}", *KINDS[kind]])
    return VisionModel(config, data.answers, data.public)


def trainer_of(model: VisionModel, kind: str) -> TorchTrainer:
    """With the preset's settings."""
    settings = torch_settings(load_preset("vqa", KINDS[kind]).train)
    return TorchTrainer(model.adapter, model.task, model.digest, settings)


def plan(rows: EncodedQuestions, steps: int, batch: int, seed: int) -> LocalPlan:
    """The preset's learning rate, falling to a tenth."""
    batches = plan_batches(rows.lengths, steps, batch, np.random.default_rng(seed))
    rates = (learning_rate("linear", 3e-3, 0.1, step, steps) for step in range(steps))
    return LocalPlan(batches, rates, seed)


def attack(model: VisionModel, tested: EncodedQuestions) -> dict[str, float]:
    """Answers that the server reads off: with the output layer, and with the readout as well."""
    readout = model.adapter.module.get_submodule("readout")
    task: Any = model.client.task
    states, labels = [], []
    for start in range(0, len(tested), 32):
        rows = np.arange(start, min(start + 32, len(tested)))
        prompt, right = task.batch(tested, rows, torch.device("cpu"))
        with torch.inference_mode():
            states.append(model.decoder.outputs(*model.adapter.module(prompt)).numpy())
        labels.append(right.numpy())
    state, label = np.concatenate(states), np.concatenate(labels)
    x = torch.tensor(state, requires_grad=True)
    loss = functional.cross_entropy(readout(x), torch.from_numpy(label), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    weight = model.decoder.head.weight.numpy()
    guess = label_inference.label_from_state(weight, gradient.numpy())
    known = label_inference.label_by_readout(readout, state, gradient.numpy())
    return {
        "answers read with the output layer": float((guess == label).mean()),
        "answers read with the readout too": float((known == label).mean()),
    }


if __name__ == "__main__":
    main()
