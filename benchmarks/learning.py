"""What federated training reaches, against all data in one place, on the same budget.

    python benchmarks/learning.py --seeds 0 1 2 --out learning.json

The preset `hospitals` is run as it is (Dirichlet 0.3) and with `--partition iid`; centralized
training gets the same sample-steps (examples × optimizer steps), and for the first seed twice
as many to show whether it has converged. The test texts are of three-character categories that
nobody trains on; nothing was chosen on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedtune.config import load_preset
from fedtune.flower.pool import Failed, ForkPool, Task
from fedtune.simulation.job import text_job
from fedtune.simulation.references import sample_steps, train_centralized

PARTITIONS = ("iid", "dirichlet:0.3")
TARGETS = {"iid": 0.97, "dirichlet:0.3": 0.92}
PRESET_TARGET = 0.62


def main() -> None:
    """Run everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE")
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    args = parser.parse_args()
    budget, central = centralized(args.seeds, args.set)
    federated = {p: [simulate(p, seed, args.set) for seed in args.seeds] for p in PARTITIONS}
    accuracies = {**central, **{p: [r["accuracy"] for r in runs] for p, runs in federated.items()}}
    show(budget, accuracies)
    if args.out:
        figures = {"seeds": args.seeds, "sample_steps": budget, "accuracy": accuracies}
        figures["seconds"] = {p: [r["seconds"] for r in runs] for p, runs in federated.items()}
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


def simulate(partition: str, seed: int, settings: list[str]) -> dict[str, float]:
    """One run of the real command."""
    command = [sys.executable, "-m", "fedtune.cli", "simulate", "--json", "--seed", str(seed)]
    command += ["--partition", partition, *(part for s in settings for part in ("--set", s))]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, "--out", f"{folder}/run"], stdout=subprocess.PIPE, check=True, text=True
        )
    summary = json.loads(done.stdout)
    found = {"accuracy": summary["final"]["accuracy"], "seconds": summary["seconds"]}
    print(
        f"{partition}, seed {seed}: {found['accuracy']:.1%} in {found['seconds']:.0f} s", flush=True
    )
    return found


def centralized(seeds: list[int], settings: list[str]) -> tuple[int, dict[str, list[float]]]:
    """The budget of the preset, and accuracy per seed on it and on twice as much."""
    job = text_job(load_preset("hospitals", settings))
    initial = job.adapter.read()
    budget = sample_steps(job, len(job.clients))

    def train(payload: bytes) -> bytes:
        seed, steps = json.loads(payload)
        seeded = replace(job, config=job.config.model_copy(update={"seed": seed}))
        result = train_centralized(seeded, initial, steps)
        return json.dumps(result.evaluation.accuracy).encode()

    pool = ForkPool({"train": train}, size=2)
    # The longest first, so that the two workers end together.
    jobs = [(seeds[0], 2 * budget), *((seed, budget) for seed in seeds)]
    tasks = [Task(i, "train", partial(_encode, wanted)) for i, wanted in enumerate(jobs)]
    results: dict[tuple[int, int], float] = {}
    for place, answer in pool.run(tasks):
        if isinstance(answer, Failed):
            raise SystemExit(f"centralized training failed: {answer.reason}")
        results[jobs[place]] = json.loads(answer)
        print(
            f"centralized, (seed, sample-steps) {jobs[place]}: {json.loads(answer):.1%}", flush=True
        )
    pool.close()
    doubled = f"centralized, twice the budget, seed {seeds[0]}"
    once = [results[seed, budget] for seed in seeds]
    return budget, {"centralized": once, doubled: [results[seeds[0], 2 * budget]]}


def show(budget: int, accuracies: dict[str, list[float]]) -> None:
    """A Markdown table, and whether the targets are reached."""
    central = statistics.mean(accuracies["centralized"])
    print(f"\n{budget:,} sample-steps\n")
    print("| training | accuracy (mean) | min to max | of centralized |\n|---|---|---|---|")
    for name, values in accuracies.items():
        mean = statistics.mean(values)
        spread = f"{min(values):.1%} to {max(values):.1%}"
        print(f"| {name} | {mean:.1%} | {spread} | {mean / central:.1%} |")
    for partition, target in TARGETS.items():
        share = statistics.mean(accuracies[partition]) / central
        print(
            f"{_verdict(share >= target)} {partition}: {share:.1%} of centralized (≥ {target:.0%})"
        )
    worst = min(accuracies["dirichlet:0.3"])
    reached = _verdict(worst >= PRESET_TARGET)
    print(f"{reached} preset: worst seed {worst:.1%} (≥ {PRESET_TARGET:.0%})")


def _encode(value: object) -> bytes:
    return json.dumps(value).encode()


def _verdict(reached: bool) -> str:
    return "PASS" if reached else "MISS"


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it is, with defaults."""


if __name__ == "__main__":
    main()
