"""What an adapter that was trained against an emulator is worth in the whole model.

    python benchmarks/emulator.py --layers 8 12 20 --steps 100

NanoAdapters are trained in one place on easy-VQA's private questions, against SmolLM2-135M itself
and against emulators of it, all with the same batches. Each is then tested where it was trained,
and in the whole model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from fedtune.base.answering import Answering, AnsweringDecoder
from fedtune.base.emulator import Emulator, write_emulator
from fedtune.base.layers import layer_states, plan_layers, similarities
from fedtune.config import parse_config
from fedtune.data import PartitionSpec
from fedtune.data.easy_vqa import load_easy_vqa
from fedtune.data.questions import FederatedQuestions
from fedtune.simulation.vision import VisionModel
from fedtune.train.batches import plan_batches
from fedtune.train.cut import WholeModel
from fedtune.train.questions import PROMPT, QuestionAnswering
from fedtune.train.torch_trainer import TorchSettings, TorchTrainer
from fedtune.train.trainer import LocalPlan
from fedtune.types import Float32Vector

LR = 3e-3
SETS = (
    'base.path="SmolLM2-135M-Instruct"',
    "base.task=visual-question-answering",
    "adapter.kind=nano",
    "adapter.rank=32",
)


class Bench:
    """The model, its questions and the batches that all are trained with."""

    def __init__(self, data: FederatedQuestions, steps: int, batch: int, tested: int) -> None:
        self.model = VisionModel(parse_config("", "benchmark", SETS), data.answers, data.public)
        self.train = self.model.prepare(data.clients[0].train)
        self.test = self.model.prepare(data.test.select(range(tested)))
        self._initial = self.model.adapter.read()
        self._batches = [
            np.asarray(rows)
            for rows in plan_batches(self.train.lengths, steps, batch, np.random.default_rng(0))
        ]

    def trained(self, within: Answering) -> Float32Vector:
        """The adapter after the steps."""
        steps = len(self._batches)
        rates = (LR * (1 - 0.9 * step / steps) for step in range(steps))
        plan = LocalPlan(iter(self._batches), rates, 0)
        return self._trainer(within).train(self._initial, self.train, plan).adapter

    def accuracy(self, within: Answering, adapter: Float32Vector | None = None) -> float:
        """Of this adapter, or of none, in this decoder."""
        vector = self._initial if adapter is None else adapter
        return float(self._trainer(within).evaluate(vector, self.test).accuracy or 0.0)

    def _trainer(self, within: Answering) -> TorchTrainer:
        task = QuestionAnswering(self.model.task.pad_id, WholeModel(within))
        settings = TorchSettings("adamw", 0.0, 1.0)
        return TorchTrainer(self.model.adapter, task, self.model.digest, settings)


def main() -> None:
    """Train, test, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 12, 20])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--test", type=int, default=300, help="questions")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = load_easy_vqa(partition=PartitionSpec("iid"), clients=1, seed=0)
    bench = Bench(data, args.steps, args.batch_size, args.test)
    base, whole = bench.model.base, bench.model.decoder
    similarity = similarities(
        layer_states(base, [PROMPT.format(question=asked) for asked in data.public_questions])
    )
    print("| layers | share | parameters | MB | CKA | untrained | trained | plugged in |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    figures = [show(bench, whole, None)]
    for keep in args.layers:
        for share in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "emulator"
                plan = plan_layers(similarity, keep, share)
                digest = write_emulator(path, base, data.answers, plan)
                figures.append(show(bench, whole, Emulator(path, whole.tokens, digest)))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2))


def show(bench: Bench, whole: AnsweringDecoder, emulator: Emulator | None) -> dict[str, object]:
    """Train against the emulator, or against the whole model, and print a row."""
    within = emulator or whole
    adapter = bench.trained(within)
    before, after = bench.accuracy(within), bench.accuracy(within, adapter)
    plugged = bench.accuracy(whole, adapter) if emulator else after
    plan = emulator.manifest.plan if emulator else None
    found = {
        "standing": plan.standing if plan else None,
        "parameters": emulator.parameters if emulator else bench.model.base.parameters,
        # Weights in half precision, as an emulator's are.
        "bytes": emulator.size if emulator else 2 * bench.model.base.parameters,
        "similarity": plan.similarity if plan else 1.0,
        "untrained": before,
        "trained": after,
        "plugged": plugged,
    }
    layers, share = (len(plan.kept), "yes" if plan.shared else "no") if plan else ("all", "")
    size = f"{found['parameters'] / 1e6:.1f} M | {found['bytes'] / 1e6:.0f}"
    shares = " | ".join(f"{share:.1%}" for share in (before, after, plugged))
    print(f"| {layers} | {share} | {size} | {found['similarity']:.3f} | {shares} |", flush=True)
    return found


if __name__ == "__main__":
    main()
