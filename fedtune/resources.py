"""What this machine has, and what this process takes of it."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_ARENA_MAX = -8  # M_ARENA_MAX of malloc.h


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int:
    """Bytes that can be had without swapping, within this container's limit.

    Where the system does not say what is free (it is not Linux): all of its memory.
    """
    if sys.platform != "linux":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    limit, used = (_CGROUP / name for name in ("memory.max", "memory.current"))
    try:
        left = int(limit.read_text()) - int(used.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return free
    return min(free, max(0, left))


def resident_memory() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    return _of_this_process("VmRSS")


def peak_memory() -> int:
    """The most bytes of memory that this process has held; 0 where the system does not say.

    Unlike `resource.getrusage`, which counts what the parent held when this process was started.
    """
    return _of_this_process("VmHWM")


def forget_peak_memory() -> None:
    """Let `peak_memory` begin anew, from what this process holds now. Only on Linux."""
    Path("/proc/self/clear_refs").write_text("5")


def _of_this_process(name: str) -> int:
    return _kilobytes(Path("/proc/self/status"), name) if sys.platform == "linux" else 0


def _kilobytes(file: Path, name: str) -> int:
    """The value of a line like `name:   123 kB`, in bytes."""
    for line in file.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{file} has no {name}")


def use_one_arena() -> None:
    """Let threads that start from now on allocate where the first one does.

    glibc gives others an arena of their own, which hands every large block back to the system: a
    model that computes in such a thread faults all its pages in anew at each step, and took 690 ms
    where it takes 500. Other C libraries have no such arenas.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_ARENA_MAX, 1)
