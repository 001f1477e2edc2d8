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
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil

FEDTUNE = Path(sys.executable).with_name("fedtune")
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
        prepare(folder, args)
        peaks = run(folder, args.clients)
        records = [json.loads(line) for line in (folder / "run/metrics.jsonl").open()]
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
        print(f"| {words}, RSS MiB | {peak / 2**20:.0f} | |")
    median = statistics.median(overhead)
    print(f"\n{'PASS' if median <= 1.5 else 'MISS'} {median:.2f} s beyond training, at most 1.5")
    client = peaks["client, network"] / 2**20
    print(f"{'PASS' if client <= 120 else 'MISS'} {client:.0f} MiB of a client, at most 120")


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """A federation whose rounds are short."""
    command = [FEDTUNE, "init", folder, "--example", args.clients, "--port", args.port]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    file = folder / "federation.toml"
    text = re.sub(r"^count = \d+", f"count = {args.rounds}", file.read_text(), flags=re.MULTILINE)
    file.write_text(re.sub(r"^steps = \d+", f"steps = {args.steps}", text, flags=re.MULTILINE))
    server = folder / "server.toml"
    server.write_text(server.read_text().replace('test = "test.csv"', ""))


def run(folder: Path, clients: int) -> dict[str, float]:
    """Run all processes to their end; the largest resident sets in bytes."""
    peaks: dict[str, float] = defaultdict(float)
    processes = [start(folder / "server.log", "server", folder / "federation.toml")]
    for number in range(1, clients + 1):
        file = folder / "sites" / f"hospital-{number}" / "client.toml"
        processes.append(start(folder / f"client-{number}.log", "client", file, "--once"))
    while any(process.poll() is None for process in processes):
        for process in processes:
            for words, size in sizes(process.pid):
                peaks[words] = max(peaks[words], size)
        time.sleep(0.2)
    if codes := [process.returncode for process in processes if process.returncode]:
        raise SystemExit(f"a process ended with {codes}; {(folder / 'server.log').read_text()}")
    return dict(peaks)


def start(log: Path, *arguments: object) -> subprocess.Popen[bytes]:
    """Start a command whose output goes to `log`."""
    with log.open("wb") as output:
        command = [str(FEDTUNE), *map(str, arguments)]
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def sizes(pid: int) -> list[tuple[str, float]]:
    """The resident sets of a command and of what it started, by kind of process."""
    found = []
    try:
        own = psutil.Process(pid)
        kind = "server" if "server" in own.cmdline() else "client, network"
        found.append((kind, own.memory_info().rss))
        for child in own.children():
            words = " ".join(child.cmdline())
            kind = "Flower's SuperLink" if "superlink" in words else "client, training"
            found.append((kind, child.memory_info().rss))
    except psutil.Error:
        pass
    return found


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
