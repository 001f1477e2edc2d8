"""Runs a command and watches it: wall time, and memory of all its processes. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
MIB = 1024  # kilobytes, as /proc counts


@dataclass(frozen=True)
class Measured:
    """One run of a command; memory in MiB."""

    status: int
    spawned: float
    total_s: float
    cpu_s: float  # of all its processes
    rss_mib: float  # sum over all processes; shared pages count once for each
    pss_mib: float  # the same with shared pages divided among those that share them
    largest_mib: float  # resident set of the largest single process


def adopt_orphans() -> None:
    """Processes that a command leaves behind stay in this one's tree."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def measure(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    *,
    timeout: float,
    interval: float = 0.5,
    watch: Callable[[], None] | None = None,
) -> Measured:
    """Run `command` to its end or `timeout`, its output in `log`.

    Memory is read every `interval` seconds; PSS at every second reading, because the kernel
    walks all pages for it. `watch` is called every five milliseconds.
    """
    memory = _Memory(interval)
    cpu_before = _cpu_of_children()
    with log.open("wb") as output:
        spawned = time.time()
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        memory.start()
        try:
            while process.poll() is None and time.time() - spawned < timeout:
                time.sleep(0.005)
                if watch:
                    watch()
        finally:
            total = time.time() - spawned
            memory.stop()
            _end(process)
    return Measured(
        process.returncode,
        spawned,
        total,
        # Ray ends its actors without waiting for them: their time is only in the readings.
        max(_cpu_of_children() - cpu_before, sum(memory.cpu.values())),
        memory.rss / MIB,
        memory.pss / MIB,
        memory.largest / MIB,
    )


class _Memory(threading.Thread):
    """Peaks over all descendants of this process, in kilobytes, and their CPU seconds."""

    def __init__(self, interval: float) -> None:
        super().__init__(daemon=True)
        self.rss = self.pss = self.largest = 0
        self.cpu: dict[int, float] = {}
        self._interval = interval
        self._over = threading.Event()

    def run(self) -> None:
        readings = 0
        while not self._over.wait(self._interval):
            readings += 1
            self._read(with_pss=readings % 2 == 0)

    def stop(self) -> None:
        self._over.set()
        self.join()

    def _read(self, with_pss: bool) -> None:
        rss = pss = 0
        for pid, seconds in _descendants().items():
            self.cpu[pid] = seconds
            status = _text(pid, "status")
            rss += _kilobytes(status, "VmRSS")
            self.largest = max(self.largest, _kilobytes(status, "VmHWM"))
            if with_pss:
                pss += _kilobytes(_text(pid, "smaps_rollup"), "Pss")
        self.rss, self.pss = max(self.rss, rss), max(self.pss, pss)


def _cpu_of_children() -> float:
    """Seconds of all processes that have ended and were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _text(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""  # it has ended


def _kilobytes(text: str, key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) if found else 0


def _descendants() -> dict[int, float]:
    """CPU seconds so far of every process below this one."""
    children: dict[int, list[int]] = {}
    seconds = {}
    for pid in [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]:
        fields = _text(pid, "stat").rpartition(")")[2].split()
        if fields:
            children.setdefault(int(fields[1]), []).append(pid)
            seconds[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    found, frontier = [], [os.getpid()]
    while frontier:
        frontier = [child for pid in frontier for child in children.get(pid, [])]
        found += frontier
    return {pid: seconds[pid] for pid in found}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for what a command left behind; after ten seconds end it."""
    if process.poll() is None:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 10
    while left := _descendants():
        for pid in left:
            with contextlib.suppress(ChildProcessError, ProcessLookupError):
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.1)
