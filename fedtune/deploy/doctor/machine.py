"""Disk, memory, cores and the device, against what the job needs."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedtune.deploy.doctor.findings import Examination, Verdict
from fedtune.report import words
from fedtune.resources import available_memory, usable_cores

NETWORK_PROCESS = 120 << 20  # bytes, of a site; benchmarks/deployment.py holds it to that
SCARCE = 1.5  # less than so many times the need is worth a warning


@dataclass(frozen=True)
class Needs:
    """Bytes that a job needs; None: not known, as without a configuration."""

    disk: int | None = None
    memory: int | None = None


def examine_machine(
    examination: Examination,
    folder: Path,
    needs: Needs = Needs(),
    threads: int | None = None,
    device: str | None = None,
) -> None:
    """What this machine has; `folder`, which need not exist yet, is where the job writes."""
    examination.begin("machine")
    examination.run("disk", lambda: _disk(folder, needs.disk))
    examination.run("memory", lambda: _memory(needs.memory))
    examination.run("cores", lambda: _cores(threads))
    if device is not None and importlib.util.find_spec("torch"):
        examination.run("device", lambda: _device(device), "use auto or cpu")


def _disk(folder: Path, need: int | None) -> Verdict[None]:
    there = folder.absolute()
    while not there.is_dir():
        there = there.parent
    free = shutil.disk_usage(there).free
    numbers = {"free_bytes": free, **({} if need is None else {"need_bytes": need})}
    if not os.access(there, os.W_OK):
        return Verdict("problem", f"{there} cannot be written", "give this user the right to")
    return _enough(free, need, f"free at {there}", "free some space there", numbers)


def _memory(need: int | None) -> Verdict[None]:
    free = available_memory()
    numbers = {"free_bytes": free, **({} if need is None else {"need_bytes": need})}
    advice = "lower train.batch-size or base.max-length with all parties, or add memory"
    return _enough(free, need, "of memory available", advice, numbers)


def _enough(
    free: int, need: int | None, what: str, advice: str, numbers: Mapping[str, float]
) -> Verdict[None]:
    text = f"{words.size(free)} {what}"
    if need is None:
        return Verdict("ok", text, numbers=numbers)
    text += f", about {words.size(need)} needed"
    if free < need:
        return Verdict("problem", text, advice, numbers)
    if free < SCARCE * need:
        return Verdict("warning", text, advice, numbers)
    return Verdict("ok", text, numbers=numbers)


def _cores(threads: int | None) -> Verdict[None]:
    cores = usable_cores()
    if threads is None:
        return Verdict("ok", words.plural(cores, "core"))
    text = f"{words.plural(cores, 'core')}, {words.plural(threads, 'thread')} to train with"
    if threads > cores:
        return Verdict("warning", text, f"set machine.threads to {cores} or less")
    return Verdict("ok", text)


def _device(name: str) -> Verdict[None]:
    import torch

    from fedtune.train.torch_trainer import choose_device

    device = choose_device(name)
    if device.type != "cuda":
        return Verdict("ok", f"device = {name}: {device.type}")
    free, total = torch.cuda.mem_get_info(device)
    text = f"device = {name}: {torch.cuda.get_device_name(device)}"
    text += f", {words.size(free)} of {words.size(total)} free"
    return Verdict("ok", text, numbers={"free_bytes": free})
