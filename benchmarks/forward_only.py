"""What training without gradients reaches, and what it costs, beside backpropagation.

    python benchmarks/forward_only.py --chapters 4 --clients 4 --steps 100 --rounds 10

Clients hold the training texts of some chapters of ICD-10-CM, evenly dealt; the test texts are of
three-character categories that nobody trains on. Both methods run as `fedtune simulate` with the
packaged MiniLM, one process, the same data and batch size. A pass is one forward pass of a batch at
one client; a backpropagation step counts as three, by its arithmetic.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.data import PartitionSpec, TextExamples, load_icd10

PASSES = {"backprop": 3, "forward-only": 2}


def main() -> None:
    """Run both methods and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chapters", type=int, default=4)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100, help="per round, forward-only")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--lr", type=float, default=10.0, help="forward-only")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE")
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    args = parser.parse_args()
    common = [*args.set, f"train.batch-size={args.batch_size}"]
    settings = {
        "backprop": ["train.steps=10", "train.lr=5e-3", *common],
        "forward-only": [
            "train.method=forward-only",
            "train.optimizer=sgd",
            f"train.steps={args.steps}",
            f"train.lr={args.lr}",
            *common,
        ],
    }
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        data = write_clients(Path(folder) / "data", args.chapters, args.clients)
        for method, overrides in settings.items():
            run = Path(folder) / method
            figures[method] = simulate(data, run, args.rounds, overrides)
            show(method, figures[method], PASSES[method])
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


def write_clients(folder: Path, chapters: int, clients: int) -> Path:
    """A folder of clients with the rows of so many chapters, and a common test set."""
    data = load_icd10(partition=PartitionSpec.parse("iid"), clients=clients, seed=0)
    chosen = np.linspace(0, len(data.labels) - 1, chapters).astype(int)

    def write(path: Path, examples: TextExamples) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            json.dumps({"text": text, "label": data.labels[label]}) + "\n"
            for text, label in zip(examples.texts, examples.labels.tolist(), strict=True)
            if label in chosen
        ]
        path.write_text("".join(rows))

    for client in data.clients:
        write(folder / client.name / "train.jsonl", client.train)
    if data.test is None:
        raise SystemExit("the packaged data has no test set")
    write(folder / "test.jsonl", data.test)
    return folder


def simulate(data: Path, run: Path, rounds: int, overrides: list[str]) -> dict[str, Any]:
    """One run of the real command: its summary, and accuracy and seconds of each round."""
    command = [sys.executable, "-m", "fedtune.cli", "simulate", "--data", str(data), "--json"]
    command += ["--rounds", str(rounds), "--workers", "1", "--out", str(run)]
    command += [part for override in overrides for part in ("--set", override)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    summary: dict[str, Any] = json.loads(done.stdout)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {"summary": summary, "rounds": [json.loads(line) for line in lines]}


def show(method: str, figures: dict[str, Any], passes: int) -> None:
    """A Markdown table of some rounds."""
    summary, rounds = figures["summary"], figures["rounds"]
    steps = _steps(summary)
    print(f"\n{method}, {steps} steps per round: {summary['adapter']}")
    print(
        f"{summary['bytes_up_per_client_round']:,} bytes up, "
        f"{summary['bytes_down_per_client_round']:,} down per client and round; "
        f"peak {summary['peak_rss_mb']:.0f} MiB\n"
    )
    print("| round | passes per client | accuracy | loss | seconds of training per client |")
    print("|---|---|---|---|---|")
    seconds = 0.0
    for record in rounds:
        seconds += record["train_seconds"] / len(record["clients"])
        print(
            f"| {record['round']} | {record['round'] * steps * passes} | "
            f"{record['accuracy']:.1%} | {record['loss']:.3f} | {seconds:.0f} |",
            flush=True,
        )


def _steps(summary: dict[str, Any]) -> int:
    path = Path(summary["run"]) / "config.toml"
    return int(tomllib.loads(path.read_text())["train"]["steps"])


if __name__ == "__main__":
    main()
