"""What the embeddings at the cut give away, with and without noise, by easy-VQA and SmolLM2.

    python benchmarks/cut_privacy.py
    python benchmarks/cut_privacy.py --etas 50 100 --accuracy 150

Attackers are those of tests/adversary. They host the language model: they know the token table and
the NanoAdapters of the round, all settings of the noise, the public images of easy-VQA, and for
"whole question" all questions that are ever asked. NanoAdapters are moved at random, by about half
of an embedding's length, in the place of trained ones. `--accuracy` trains NanoAdapters centrally
with that noise, so many steps of 8 examples for each eta: minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before numpy: two pools of threads on few cores wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray

from fedtune.adapter.nano import NanoAdapter
from fedtune.base.connector import Pretraining, pretrain
from fedtune.base.vision import VisionEncoder
from fedtune.config import parse_config
from fedtune.data import PartitionSpec
from fedtune.data.easy_vqa import load_easy_vqa
from fedtune.data.questions import FederatedQuestions
from fedtune.privacy.metric import MetricPrivacy
from fedtune.privacy.randomness import SecureRandom
from fedtune.simulation.vision import VisionModel
from fedtune.train.batches import plan_batches
from fedtune.train.torch_trainer import TorchSettings, TorchTrainer
from fedtune.train.trainer import LocalPlan

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from adversary import feature_inversion, token_inversion
from adversary.smollm2_table import TokenTable, load_token_table

RANK = 32
Rows = NDArray[np.float32]


def main() -> None:
    """Attack at every eta and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--etas", type=float, nargs="+", default=[400, 200, 100, 70, 50, 30, 20, 10]
    )
    parser.add_argument("--clip", type=float, default=4.0)
    parser.add_argument("--questions", type=int, default=30)
    parser.add_argument("--images", type=int, default=400, help="private ones")
    parser.add_argument("--sendings", type=int, default=10, help="of one example, for the last")
    parser.add_argument("--accuracy", type=int, metavar="STEPS", default=0)
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    data = load_easy_vqa(partition=PartitionSpec.parse("iid"), clients=1, seed=0)
    table = load_token_table()
    text = TextAttack(table, data, args.questions, args.clip)
    image = ImageAttack(table, data, args.images)
    print(
        f"clip {args.clip:g}; {len(text.sent)} tokens of {args.questions} questions, "
        f"{len(image.tokens) - image.public} private and {image.public} public images; without "
        f"seeing anything: colour {image.guess.colours:.0%}, shape {image.guess.shapes:.0%}, "
        f"pixel error {image.guess.error:.4f}\n"
    )
    columns = ["eta", "local epsilon of a token", "noise / embedding", "tokens", "tokens, plain"]
    columns += ["whole question", "colour", "shape", "pixel error"]
    columns += [f"{what}, sent {args.sendings} times" for what in ("tokens", "colour", "shape")]
    columns += ["accuracy"] * bool(args.accuracy)
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    figures = []
    for eta in [None, *args.etas]:
        privacy = None if eta is None else MetricPrivacy(args.clip, eta)
        found = measure(text, image, privacy, args.sendings)
        if args.accuracy:
            found["accuracy"] = accuracy(data, privacy, args.accuracy)
        figures.append({"eta": eta, **found})
        print(f"| {' | '.join(cells(eta, found))} |", flush=True)
    print(f"\n{time.perf_counter() - started:.0f} s")
    if args.out:
        args.out.write_text(json.dumps({"clip": args.clip, "rows": figures}, indent=2) + "\n")


class TextAttack:
    """Questions as they are sent, and what the attacker compares them with."""

    def __init__(
        self, table: TokenTable, data: FederatedQuestions, count: int, clip: float
    ) -> None:
        adapter = moved_adapter(table.width, float(np.linalg.norm(table.rows, axis=1).mean()), 1)
        asked = sorted(set(data.clients[0].train.questions))
        self.kinds = [table.ids(question) for question in asked]
        chosen = np.random.default_rng(0).permutation(len(asked))[:count]
        self.questions = [self.kinds[place] for place in chosen]
        self.ids = np.concatenate([np.array(ids) for ids in self.questions])
        self.table, self.clip = table, clip
        everything = token_inversion.adapted_table(table.rows, adapter)
        self.sent = everything[self.ids]
        self.clear = everything
        self.clipped = token_inversion.adapted_table(table.rows, adapter, clip)

    def run(self, privacy: MetricPrivacy | None, sendings: int) -> dict[str, float]:
        """Shares of tokens and questions that are recovered."""
        rows = self.clear if privacy is None else self.clipped
        copies = released(self.sent, privacy, sendings)
        parts = np.split(copies[0], np.cumsum([len(ids) for ids in self.questions])[:-1])
        guesses = token_inversion.likeliest_question(parts, self.kinds, rows)
        right = [self.kinds[g] == ids for g, ids in zip(guesses, self.questions, strict=True)]
        plain = token_inversion.nearest_tokens(copies[0], self.table.rows)
        error = np.linalg.norm(copies[0] - rows[self.ids], axis=1)
        return {
            "noise": float((error / np.linalg.norm(rows[self.ids], axis=1)).mean()),
            "tokens": float((token_inversion.nearest_tokens(copies[0], rows) == self.ids).mean()),
            "plain": float((plain == self.ids).mean()),
            "question": float(np.mean(right)),
            "tokens_again": float(
                (token_inversion.likeliest_tokens(copies, rows) == self.ids).mean()
            ),
        }


class ImageAttack:
    """Image tokens, public ones first."""

    def __init__(self, table: TokenTable, data: FederatedQuestions, private: int) -> None:
        train = data.clients[0].train
        words = _words(data)
        files = [train.files[place] for place in sorted(words)[:private]]
        captions = [*data.public.words, *(words[place] for place in sorted(words)[:private])]
        self.public = len(data.public)
        features = VisionEncoder().features([*data.public.files, *files])
        targets = np.stack([table.rows[[table.word(w) for w in row]] for row in data.public.words])
        connector = pretrain(features[: self.public], targets, Pretraining(steps=500))
        adapter = moved_adapter(table.width, float(connector.length), 2)
        with torch.inference_mode():
            tokens = adapter(connector(torch.from_numpy(features.astype(np.float32))))
        self.tokens = tokens.numpy()
        self.pictures = feature_inversion.read_pictures([*data.public.files, *files], captions)
        self.guess = feature_inversion.best_guess(self.pictures, self.public)

    def run(self, privacy: MetricPrivacy | None, sendings: int) -> dict[str, float]:
        """Shares of colours and shapes that are recovered, after one sending and after several."""
        once = self._attack(noise_of(privacy, 1))
        again = self._attack(noise_of(privacy, sendings), 10) if privacy else once
        return {
            "colour": once.colours,
            "shape": once.shapes,
            "pixels": once.error,
            "colour_again": again.colours,
            "shape_again": again.shapes,
        }

    def _attack(
        self, noise: Callable[[Rows], Rows] | None, epochs: int = 30
    ) -> feature_inversion.Recovered:
        return feature_inversion.attack(self.tokens, self.pictures, self.public, noise, epochs)


def measure(
    text: TextAttack, image: ImageAttack, privacy: MetricPrivacy | None, sendings: int
) -> dict[str, Any]:
    """All attacks at one setting."""
    found: dict[str, Any] = {"epsilon": privacy.epsilon if privacy else None}
    return {**found, **text.run(privacy, sendings), **image.run(privacy, sendings)}


def cells(eta: float | None, found: dict[str, Any]) -> list[str]:
    """One row of the table."""
    parts = ["none" if eta is None else f"{eta:g}"]
    parts.append("" if found["epsilon"] is None else f"{found['epsilon']:,.0f}")
    parts.append(f"{found['noise']:.2f}")
    parts += [f"{found[name]:.0%}" for name in ("tokens", "plain", "question", "colour", "shape")]
    parts.append(f"{found['pixels']:.4f}")
    parts += [f"{found[name]:.0%}" for name in ("tokens_again", "colour_again", "shape_again")]
    return [*parts, *(f"{found['accuracy']:.1%}" for _ in range("accuracy" in found))]


def released(rows: Rows, privacy: MetricPrivacy | None, times: int) -> Rows:
    """What the server gets, `[times, n, width]`."""
    if privacy is None:
        return rows[None]
    random = SecureRandom()
    return np.stack([privacy.release(rows, random) for _ in range(times)])


def noise_of(privacy: MetricPrivacy | None, times: int) -> Callable[[Rows], Rows] | None:
    """What is left of so many sendings: their mean."""
    if privacy is None:
        return None
    return lambda rows: released(rows, privacy, times).mean(0)


def moved_adapter(width: int, length: float, seed: int) -> NanoAdapter:
    """A NanoAdapter whose output is about half an embedding's length away from its input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = NanoAdapter(width, RANK, length / width**0.5)
        torch.nn.init.normal_(adapter.up.weight, std=0.3)
    return adapter.eval()


def accuracy(data: FederatedQuestions, privacy: MetricPrivacy | None, steps: int) -> float:
    """Of NanoAdapters that were trained centrally, with this noise in training and testing."""
    sets = ['base.path="SmolLM2-135M-Instruct"', "base.task=visual-question-answering"]
    sets += ["base.placement=server", "adapter.kind=nano", f"adapter.rank={RANK}"]
    if privacy is not None:
        sets += [f"split.clip={privacy.clip}", f"split.eta={privacy.eta}"]
    model = VisionModel(parse_config("", "benchmark", sets), data.answers, data.public)
    train = model.prepare(data.clients[0].train)
    settings = TorchSettings("adamw", 0.0, 1.0)
    trainer = TorchTrainer(model.adapter, model.task, model.digest, settings)
    batches = plan_batches(train.lengths, steps, 8, np.random.default_rng(0))
    rates = [3e-3 * (1 - 0.9 * step / steps) for step in range(steps)]
    result = trainer.train(model.adapter.read(), train, LocalPlan(batches, iter(rates), 0))
    found = trainer.evaluate(result.adapter, model.prepare(data.test.select(range(200))))
    return float(found.accuracy or 0.0)


def _words(data: FederatedQuestions) -> dict[int, tuple[str, str]]:
    """Colour and shape of each private image of which both were asked."""
    train = data.clients[0].train
    found: dict[int, dict[str, str]] = {}
    shapes = {"circle", "rectangle", "triangle"}
    for image, label in zip(train.images.tolist(), train.labels.tolist(), strict=True):
        answer = data.answers[label]
        if answer not in {"yes", "no"}:
            found.setdefault(image, {})["shape" if answer in shapes else "colour"] = answer
    return {
        image: (words["colour"], words["shape"])
        for image, words in found.items()
        if len(words) == 2
    }


if __name__ == "__main__":
    main()
