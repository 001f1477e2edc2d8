"""A deployed federation on this machine: what a round takes beyond training, and memory.

    python benchmarks/deployment.py --clients 4 --rounds 6

`fedtune init --example`, then a server and so many clients, each a process with a training process
of its own, over TLS on the loopback, masked, with MiniLM. The overhead of a round is its seconds
less those that the slowest client trained: greeting, five exchanges, masks, journal, and the
server's evaluation is left out (there is no test set). Memory is the largest resident set of each
kind of process. Linux only.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

from deployed import client_commands, metrics, prepare, run

TRAINED = re.compile(r"round (\d+): trained in ([\d.]+) s")


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--port", type=int, default=19192)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "federation"
        settings = {"rounds.count": str(args.rounds), "train.steps": str(args.steps)}
        prepare(folder, args.clients, args.port, settings)
        peaks = run(folder, client_commands(folder, args.clients))
        records = metrics(folder / "run")
        slowest = training(folder, args.clients)
    if len(records) != args.rounds:
        raise SystemExit(f"{len(records)} of {args.rounds} rounds")
    overhead = [record["seconds"] - slowest[record["round"]] for record in records[1:]]
    rounds = [record["seconds"] for record in records[1:]]
    print("| | median | lowest to highest |\n|---|---|---|")
    for words, values in (("round, s", rounds), ("beyond training, s", overhead)):
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"| {words} | {statistics.median(values):.2f} | {spread} |")
    for words, peak in sorted(peaks.items()):
        print(f"| {words}, RSS MiB | {peak:.0f} | |")
    median = statistics.median(overhead)
    print(f"\n{'PASS' if median <= 1.5 else 'MISS'} {median:.2f} s beyond training, at most 1.5")
    client = peaks["client, network"]
    print(f"{'PASS' if client <= 120 else 'MISS'} {client:.0f} MiB of a client, at most 120")


def training(folder: Path, clients: int) -> dict[int, float]:
    """By round, the seconds of the client that trained longest."""
    slowest: dict[int, float] = defaultdict(float)
    for number in range(1, clients + 1):
        text = (folder / f"client-{number}.log").read_text()
        for round_number, seconds in TRAINED.findall(text):
            slowest[int(round_number)] = max(slowest[int(round_number)], float(seconds))
    return dict(slowest)


if __name__ == "__main__":
    main()
