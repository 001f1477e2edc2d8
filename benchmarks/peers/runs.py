"""One run of one path: the command, what it measured, and the adapter that it ended with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from peers.job import CORES, SPAWNED, Job, write_job
from peers.measure import Measured, measure

HERE = Path(__file__).resolve().parent.parent
ENVIRONMENT = {"PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
Adapter = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Run:
    """What one run of a path took; `failed` is the end of its output."""

    path: str
    startup_s: float = 0.0
    rounds_s: tuple[float, ...] = ()
    total_s: float = 0.0
    cpu_s: float = 0.0
    rss_mib: float = 0.0
    pss_mib: float = 0.0
    largest_mib: float = 0.0
    distance: float | None = None
    failed: str | None = None

    @property
    def first_s(self) -> float:
        """Seconds of round 1, where much is loaded lazily."""
        return self.rounds_s[0]

    @property
    def later_s(self) -> float:
        """Median seconds of the rounds after the first."""
        return float(np.median(self.rounds_s[1:]))


def prepare_job(job: Job) -> Job:
    """Write the job's folder, in a process of its own: this one stays small and without threads."""
    job.folder.mkdir(parents=True)
    write_job(job)
    done = _peer("prepare", job, job.folder)
    subprocess.run(done, check=True, cwd=HERE, env=_inherited())
    values = json.loads((job.folder / "job.json").read_text())
    return replace(job, labels=values["labels"])


def run_path(path: str, job: Job, out: Path, timeout: float) -> tuple[Run, Adapter | None]:
    """Run `path` once with its files in the new folder `out`."""
    out.mkdir()
    return (run_fedtune if path == "fedtune" else _run_peer)(path, job, out, timeout)


def _run_peer(path: str, job: Job, out: Path, timeout: float) -> tuple[Run, Adapter | None]:
    environment = {**ENVIRONMENT, SPAWNED: repr(time.time())}
    log = out / "log.txt"
    measured = measure(_peer(path, job, out), environment, log, timeout=timeout)
    times = out / "times.json"
    if measured.status or not times.exists():
        return _failed(path, measured, log), None
    values = json.loads(times.read_text())
    run = _run(path, measured, values["startup_s"], values["rounds_s"])
    return run, load_file(out / "adapter.safetensors")


def run_fedtune(
    path: str, job: Job, out: Path, timeout: float, interval: float = 0.5
) -> tuple[Run, Adapter | None]:
    """The real command. A round ends when its line is in `metrics.jsonl`, flushed to the disk."""
    program = shutil.which("fedtune", path=str(Path(sys.executable).parent)) or "fedtune"
    folder, log = out / "run", out / "log.txt"
    command = [program, "simulate", "--config", str(job.federation), "--out", str(folder)]
    lines = _Lines(folder / "metrics.jsonl")
    measured = measure(
        [*command, "--workers", str(CORES)],
        ENVIRONMENT,
        log,
        timeout=timeout,
        interval=interval,
        watch=lines.look,
    )
    records = lines.records()
    if measured.status or len(records) != job.rounds or any(r["failed"] for r in records):
        return _failed(path, measured, log), None
    first = lines.seen[0] - measured.spawned
    startup = first - records[0]["seconds"]
    rounds = np.diff([measured.spawned + startup, *lines.seen]).tolist()
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    return _run(path, measured, startup, rounds), adapter


class _Lines:
    """When each line of a growing file was seen first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = 0
        self.seen: list[float] = []

    def look(self) -> None:
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:
            return
        if size != self._size:
            self._size, now = size, time.time()
            new = self._path.read_bytes().count(b"\n") - len(self.seen)
            self.seen += [now] * new

    def records(self) -> list[dict[str, object]]:
        self.look()
        if not self._path.exists():
            return []
        return [json.loads(line) for line in self._path.read_text().splitlines()]


def distance(adapter: Adapter, reference: Adapter) -> float:
    """Relative L2 distance over all tensors together; infinite if they are not the same ones."""
    if adapter.keys() != reference.keys():
        return float("inf")
    ours, theirs = (
        np.concatenate([state[name].ravel().astype(np.float64) for name in sorted(reference)])
        for state in (adapter, reference)
    )
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def _peer(path: str, job: Job, out: Path) -> list[str]:
    return [sys.executable, "-m", "peers", path, str(job.folder), str(out)]


def _inherited() -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT}


def _run(path: str, measured: Measured, startup: float, rounds: list[float]) -> Run:
    return Run(
        path,
        startup,
        tuple(rounds),
        measured.total_s,
        measured.cpu_s,
        measured.rss_mib,
        measured.pss_mib,
        measured.largest_mib,
    )


def _failed(path: str, measured: Measured, log: Path) -> Run:
    text = log.read_text(errors="replace")[-3000:]
    return Run(path, failed=f"ended after {measured.total_s:.0f} s with {measured.status}\n{text}")
