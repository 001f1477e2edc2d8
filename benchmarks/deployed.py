"""Real deployed federations for the benchmarks: made, run to their end, their memory watched."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

FEDTUNE = Path(sys.executable).with_name("fedtune")


def prepare(folder: Path, clients: int, port: int, settings: Mapping[str, str]) -> None:
    """`fedtune init --example`, with some keys of federation.toml set and no test set."""
    command = [FEDTUNE, "init", folder, "--example", clients, "--port", port]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    file = folder / "federation.toml"
    text = file.read_text()
    for key, value in settings.items():
        table, name = key.split(".")
        line = rf"^{name} = .*\n"
        before, header, after = text.partition(f"[{table}]\n")
        own, bracket, rest = after.partition("\n[")
        own = re.sub(line, "", own, flags=re.MULTILINE)
        text = f"{before}{header}{name} = {value}\n{own}{bracket}{rest}"
    file.write_text(text)
    server = folder / "server.toml"
    server.write_text(server.read_text().replace('test = "test.csv"', ""))


def run(folder: Path, clients: Sequence[Sequence[object]]) -> dict[str, float]:
    """Run a server and these client commands to their end; the peak resident sets in MiB.

    A peak is the largest of its kind of process, by the kernel's own count (VmHWM).
    """
    peaks: dict[str, float] = defaultdict(float)
    processes = [start(folder / "server.log", [FEDTUNE, "server", folder / "federation.toml"])]
    for number, command in enumerate(clients, 1):
        processes.append(start(folder / f"client-{number}.log", command))
    while any(process.poll() is None for process in processes):
        for process in processes:
            for words, size in sizes(process.pid):
                peaks[words] = max(peaks[words], size)
        time.sleep(0.2)
    codes = [process.returncode for process in processes]
    if any(codes):
        raise SystemExit(f"processes ended with {codes}; {(folder / 'server.log').read_text()}")
    return dict(peaks)


def client_commands(folder: Path, clients: int) -> list[list[object]]:
    """`fedtune client` for each hospital of the example."""
    files = [folder / "sites" / f"hospital-{n}" / "client.toml" for n in range(1, clients + 1)]
    return [[FEDTUNE, "client", file, "--once"] for file in files]


def start(log: Path, command: Sequence[object]) -> subprocess.Popen[bytes]:
    """Start a command whose output goes to `log`."""
    with log.open("wb") as output:
        arguments = [str(part) for part in command]
        return subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT)


def sizes(pid: int) -> list[tuple[str, float]]:
    """The peak resident sets in MiB of a command and of what it started, by kind of process."""
    found = []
    try:
        own = psutil.Process(pid)
        kind = "server" if "server" in own.cmdline() else "client, network"
        found.append((kind, _peak(pid)))
        for child in own.children():
            words = " ".join(child.cmdline())
            kind = "Flower's SuperLink" if "superlink" in words else "client, training"
            found.append((kind, _peak(child.pid)))
    except (psutil.Error, OSError):
        pass
    return found


def _peak(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else 0.0


def metrics(folder: Path) -> list[dict[str, float]]:
    """The rounds of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]
