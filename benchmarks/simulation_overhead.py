"""What a simulated federation costs beyond its training: fedtune and peers on the same work.

    pip install ".[simulate,ray]" pfl==0.6.0
    python benchmarks/simulation_overhead.py --scenario silo --reps 3
    python benchmarks/simulation_overhead.py --scenario many --paths bare bare-2proc fedtune

Every path trains the same clients on the same batches from the same first adapter: LoRA r=8 on
query and value of all-MiniLM-L6-v2 and a linear head, AdamW, batch 8, no dropout, two cores.

| path | what it is |
|---|---|
| `bare` | a plain PyTorch loop: one process, two threads |
| `bare-2proc` | the same loop in two forked processes of one thread: the floor of two cores |
| `flower-usual` | Flower's engine (Ray) as its examples are written: model loaded in each call, \
padded to 64 |
| `flower-usual-dynpad` | the same, padded per batch |
| `flower-careful` | Flower's engine, model and tokens kept in each actor, padded per batch |
| `pfl` | Apple's pfl-research 0.6.0: one process, two threads |
| `fedtune` | the command `fedtune simulate`, with its journal, report and plots |

A path counts only if its final adapter is within 1e-3 (relative L2 distance) of that of `bare`.

Start-up is from spawning the process to the beginning of round 1; total is to its exit. Nobody
evaluates. Repetitions are interleaved. Memory and CPU time are those of all processes of a path;
PSS is read once a second. Linux only. Run it alone on the machine: other work shows in all figures
but CPU time, and most of all where two threads wait for each other (`bare`, `pfl`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from peers.job import Job
from peers.measure import adopt_orphans
from peers.runs import Adapter, Run, distance, prepare_job, run_path

FLOWER = ("flower-usual", "flower-usual-dynpad", "flower-careful")
REFERENCES = ("bare", "bare-2proc")  # what the others are compared with
PATHS = (*REFERENCES, *FLOWER, "pfl", "fedtune")
SCENARIOS = {
    "smoke": {"clients": 3, "steps": 2, "rounds": 2, "rows": 32},
    "silo": {"clients": 8, "steps": 10, "rounds": 3, "rows": 420},
    "many": {"clients": 100, "steps": 2, "rounds": 3, "rows": 64},
    "thousand": {"clients": 1000, "steps": 1, "rounds": 2, "rows": 16},
}
LATER_ROUNDS = {"silo": 1.05, "many": 1.10, "thousand": 1.10}  # at most this times bare-2proc
STARTUP_SECONDS = 2.0  # start-up and round 1 at most this longer than bare
PSS = 1.5  # peak at most this times bare
SAME = 1e-3  # relative distance of final adapters

Value = Callable[[Run], float]


@dataclass(frozen=True)
class Target:
    """A claim about fedtune; `found` is None if it was not measured."""

    words: str
    found: float | None
    limit: float

    def line(self) -> str:
        """PASS, MISS or not measured, with the figures."""
        if self.found is None:
            return f"not measured: {self.words}, target {self.limit:.2f}"
        verdict = "PASS" if self.found <= self.limit else "MISS"
        return f"{verdict}: {self.words} {self.found:.2f}, target at most {self.limit:.2f}"


class Results:
    """The runs so far; only those that did the same work count."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = list(runs)

    def counted(self, path: str) -> list[Run]:
        """Runs of a path that ended with the right adapter."""
        return [r for r in self.runs if r.path == path and _counts(r)]

    def median(self, path: str, value: Value) -> float | None:
        """Median over the counted runs."""
        found = [value(run) for run in self.counted(path)]
        return statistics.median(found) if found else None

    def ratio(self, path: str, value: Value, reference: str) -> float | None:
        """Median of a path over that of another."""
        ours, theirs = self.median(path, value), self.median(reference, value)
        return None if ours is None or not theirs else ours / theirs

    def table(self) -> str:
        """One row per path, in Markdown."""
        head = ["path", "start-up s", "first round s"]
        for words in ("later rounds", "total"):
            head += [f"{words} s", *(f"{words} × {path}" for path in REFERENCES)]
        head += ["CPU s", "peak RSS MiB", "peak PSS MiB", "distance to bare", "runs"]
        rows = [head, ["---"] * len(head)]
        for path in dict.fromkeys(run.path for run in self.runs):
            counted = self.counted(path)
            if not counted:
                rows.append([path, "not counted", *[""] * (len(head) - 2)])
                continue
            cells = [path, self._seconds(path, _startup), self._seconds(path, _first)]
            for value in (_later, _total):
                cells.append(self._seconds(path, value))
                cells += [self._ratio(path, value, r) for r in REFERENCES]
            cells.append(self._seconds(path, _cpu))
            cells += [self._memory(path, _rss), self._memory(path, _pss)]
            cells += [f"{max(run.distance or 0.0 for run in counted):.0e}", str(len(counted))]
            rows.append(cells)
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def targets(self, scenario: str) -> list[Target]:
        """The claims, in order."""
        found = []
        if limit := LATER_ROUNDS.get(scenario):
            later = self.ratio("fedtune", _later, "bare-2proc")
            found.append(Target("later rounds, times bare-2proc:", later, limit))
        ours, bare = self.median("fedtune", _until_first), self.median("bare", _until_first)
        longer = None if ours is None or bare is None else ours - bare
        words = "start-up and first round, seconds longer than bare:"
        found.append(Target(words, longer, STARTUP_SECONDS))
        found.append(Target("peak PSS, times bare:", self.ratio("fedtune", _pss, "bare"), PSS))
        return found

    def _seconds(self, path: str, value: Value) -> str:
        return _spread([value(run) for run in self.counted(path)], 2)

    def _memory(self, path: str, value: Value) -> str:
        return _spread([value(run) for run in self.counted(path)], 0)

    def _ratio(self, path: str, value: Value, reference: str) -> str:
        found = self.ratio(path, value, reference)
        return "" if found is None else f"{found:.2f}"


def _counts(run: Run) -> bool:
    return run.failed is None and run.distance is not None and run.distance < SAME


def _startup(run: Run) -> float:
    return run.startup_s


def _first(run: Run) -> float:
    return run.first_s


def _until_first(run: Run) -> float:
    return run.startup_s + run.first_s


def _later(run: Run) -> float:
    return run.later_s


def _total(run: Run) -> float:
    return run.total_s


def _cpu(run: Run) -> float:
    return run.cpu_s


def _rss(run: Run) -> float:
    return run.rss_mib


def _pss(run: Run) -> float:
    return run.pss_mib


def _spread(values: list[float], digits: int) -> str:
    """Median, and from where to where if there are several."""
    median = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return median
    return f"{median} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def run_all(
    job: Job, paths: list[str], repetitions: int, folder: Path, timeout: float
) -> Iterable[tuple[Run, float]]:
    """Each path once, then each again; with every run the load of the machine before it."""
    reference: Adapter | None = None
    for repetition in range(repetitions):
        for path in paths:
            load = os.getloadavg()[0]
            run, adapter = run_path(path, job, folder / f"{path}-{repetition}", timeout)
            if path == "bare" and reference is None:
                if adapter is None:
                    raise SystemExit(f"there is nothing to compare with: bare {run.failed}")
                reference = adapter
            if adapter and reference:
                run = replace(run, distance=distance(adapter, reference))
            yield run, load


def describe(run: Run) -> str:
    """One line while the benchmark runs."""
    if run.failed is not None:
        return f"{run.path}: FAILED, {run.failed}"
    rounds = ", ".join(f"{seconds:.2f}" for seconds in run.rounds_s)
    far = f"distance {run.distance:.0e}" if run.distance is not None else "no reference"
    remark = "" if _counts(run) else "; NOT COUNTED"
    return f"{run.path}: start-up {run.startup_s:.2f} s, rounds {rounds} s; {far}{remark}"


def require_installed(paths: Iterable[str]) -> None:
    """End with an instruction if a peer is missing."""
    needed = {"ray": "fedtune[ray]", "pfl": "pfl==0.6.0"}
    wanted = {"ray" if path in FLOWER else path for path in paths}
    missing = [
        what for m, what in needed.items() if m in wanted and not importlib.util.find_spec(m)
    ]
    if missing:
        raise SystemExit(f"not installed: {', '.join(missing)}; install it or choose --paths")


def machine() -> dict[str, object]:
    """Where the figures come from."""
    packages = ("fedtune", "torch", "transformers", "peft", "flwr", "ray", "pfl", "numpy")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
    }


def parse_arguments() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenario", choices=SCENARIOS, default="silo")
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds per run")
    parser.add_argument("--out", type=Path, help="a JSON file for all raw figures")
    return parser.parse_args()


def main() -> None:
    """Run, print the table and the claims, write the figures."""
    arguments = parse_arguments()
    # The reference of all distances is always there, and first.
    paths = list(dict.fromkeys(["bare", *arguments.paths]))
    require_installed(paths)
    adopt_orphans()
    runs, loads = [], []
    with tempfile.TemporaryDirectory() as folder:
        job = prepare_job(Job(Path(folder) / "job", **SCENARIOS[arguments.scenario]))
        for run, load in run_all(job, paths, arguments.reps, Path(folder), arguments.timeout):
            runs.append(run)
            loads.append(load)
            print(describe(run), file=sys.stderr, flush=True)
    results = Results(runs)
    targets = results.targets(arguments.scenario)
    shape = f"{job.clients} clients × {job.steps} steps × {job.rounds} rounds"
    print(f"\n{arguments.scenario}: {shape}\n\n{results.table()}\n")
    for target in targets:
        print(target.line())
    if arguments.out:
        value = {
            "scenario": arguments.scenario,
            **SCENARIOS[arguments.scenario],
            "machine": machine(),
            "targets": [asdict(target) for target in targets],
            "runs": [{**asdict(r), "load": load} for r, load in zip(runs, loads, strict=True)],
        }
        arguments.out.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()
