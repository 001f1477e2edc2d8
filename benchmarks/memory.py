"""Whether memory grows with the number of clients: 1,000 with 100 drawn per round, against 8.

    pip install ".[simulate]"
    python benchmarks/memory.py --reps 3

Both run `fedtune simulate` with two workers on texts of the same sort, as many per client (64 on
average), two steps per client and three rounds. Memory is read every tenth of a second (PSS every
fifth): the sum over all processes, where RSS counts a shared page once for each process and PSS
divides it, and the largest single process. Linux only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from peers.job import Job
from peers.measure import adopt_orphans
from peers.runs import Run, prepare_job, run_fedtune

FEW, MANY = 8, 1000
DRAWN = 100  # of the many, per round
TARGET = 1.25  # memory with many clients, at most this times that with few
KINDS = {
    "RSS of all processes": "rss_mib",
    "PSS of all processes": "pss_mib",
    "RSS of the largest process": "largest_mib",
}


def measured(few: list[Run], many: list[Run]) -> list[tuple[str, float, float]]:
    """Kind of memory, and the median peaks in MiB with few and with many clients."""
    return [
        (words, *(statistics.median(getattr(run, name) for run in runs) for runs in (few, many)))
        for words, name in KINDS.items()
    ]


def parse_arguments() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds per run")
    parser.add_argument("--out", type=Path, help="a JSON file for all raw figures")
    return parser.parse_args()


def main() -> None:
    """Run both in turn, print the table and the claims, write the figures."""
    arguments = parse_arguments()
    adopt_orphans()
    runs: dict[int, list[Run]] = {FEW: [], MANY: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = {
            clients: prepare_job(
                Job(folder / f"job-{clients}", clients, 2, 3, 64, min(clients, DRAWN))
            )
            for clients in runs
        }
        for repetition in range(arguments.reps):
            for clients, job in jobs.items():
                out = folder / f"{clients}-{repetition}"
                out.mkdir()
                run, _ = run_fedtune("fedtune", job, out, arguments.timeout, interval=0.1)
                if run.failed is not None:
                    raise SystemExit(f"{clients} clients: {run.failed}")
                runs[clients].append(run)
                print(f"{clients} clients: {run.total_s:.1f} s", file=sys.stderr, flush=True)
    rows = measured(runs[FEW], runs[MANY])
    print(f"\n| peak MiB | {FEW} clients | {MANY} clients, {DRAWN} drawn | ratio |")
    print("| --- | --- | --- | --- |")
    for words, few, many in rows:
        print(f"| {words} | {few:.0f} | {many:.0f} | {many / few:.2f} |")
    print()
    for words, few, many in rows:
        verdict = "PASS" if many / few <= TARGET else "MISS"
        print(f"{verdict}: {words}: {many / few:.2f}, target at most {TARGET:.2f}")
    if arguments.out:
        value = {str(clients): [asdict(run) for run in found] for clients, found in runs.items()}
        arguments.out.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()
