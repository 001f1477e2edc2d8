"""Faults at random, for as long as one likes, and after each run a look at what must hold.

    python tests/e2e/chaos.py --seconds 1800 --seed 7

The sequence of faults is a function of the seed; when in a round they strike is not.
"""

from __future__ import annotations

import argparse
import heapq
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

# Before anything imports huggingface_hub, which reads it once: nothing here asks the network.
os.environ["HF_HUB_OFFLINE"] = "1"

from deployed import Federation, free_port
from e2e_helpers import Launcher
from faulty_proxy import FaultyProxy
from small_files import read_icd_rows, write_clients
from tiny_base import write_tiny_base

SITES = ("clinic-0", "clinic-1", "clinic-2", "clinic-3")
GAP = (0.5, 4.0)  # seconds between two faults
LAST = (0.5, 6.0)  # seconds for which one lasts that does not end by itself
CALM_SECONDS = 240.0  # in which a run must end when nothing happens any more
LINES = 25


@dataclass(frozen=True)
class Fault:
    """What happens next: `gap` seconds after the last one, for so many `seconds`."""

    gap: float
    kind: str
    site: str
    seconds: float


KINDS = {
    "kill server": 1,
    "kill superlink": 1,
    "kill client": 3,
    "kill training": 3,
    "stop training": 3,
    "stop client": 2,
    "cut": 3,
    "stall": 3,
    "delay": 2,
    "truncate": 3,
    "fill disk": 2,
}


def faults(seed: int) -> Iterator[Fault]:
    """The endless sequence of a seed."""
    chosen = random.Random(seed)
    kinds, weights = list(KINDS), list(KINDS.values())
    while True:
        yield Fault(
            chosen.uniform(*GAP),
            chosen.choices(kinds, weights)[0],
            chosen.choice(SITES),
            chosen.uniform(*LAST),
        )


class Chaos:
    """One federation after the other, and the faults that befall them."""

    def __init__(
        self, folder: Path, base: Path, data: Path, rounds: int, say: Callable[[str], None]
    ) -> None:
        self._folder, self._base, self._data, self._rounds = folder, base, data, rounds
        self._say = say
        self._started = time.monotonic()
        self.struck: Counter[str] = Counter()
        self.ends: list[str] = []

    def run(self, seed: int, seconds: float) -> None:
        """Let faults happen for so long; raises `AssertionError` for what must not be."""
        sequence, end = faults(seed), time.monotonic() + seconds
        while time.monotonic() < end:
            number = len(self.ends)
            with ExitStack() as stack:
                run = _Run(self._folder / f"{number}", self._base, self._data, self._rounds, stack)
                try:
                    how = self._one(run, sequence, end)
                except BaseException:
                    self._say(run.story())
                    raise
            self.ends.append(how)
            self._say(f"{self._clock()} run {number} ended: {how}")

    def _one(self, run: _Run, sequence: Iterator[Fault], end: float) -> str:
        """One run to its end, with faults until `end`; how it ended."""
        calm = 0.0
        fault = next(sequence)
        due = time.monotonic() + fault.gap
        while (how := run.tend()) is None:
            now = time.monotonic()
            if now >= end:
                if not calm:
                    self._say(f"{self._clock()} calm")
                    run.calm_down()
                    calm = now + CALM_SECONDS
                assert now < calm, f"the run does not end, {CALM_SECONDS:g} s after the last fault"
            elif now >= due:
                self._say(f"{self._clock()} {fault.kind}, {fault.site}, {fault.seconds:.1f} s")
                if run.strike(fault):
                    self.struck[fault.kind] += 1
                fault = next(sequence)
                due = now + fault.gap
            time.sleep(0.02)
        run.check(how)
        return how

    def _clock(self) -> str:
        return f"{time.monotonic() - self._started:7.1f} s"


class _Run:
    """A federation of four, each site behind a proxy and with a small disk if this is root."""

    def __init__(self, folder: Path, base: Path, data: Path, rounds: int, stack: ExitStack) -> None:
        files = folder / "federation"
        files.mkdir(parents=True)
        self._launcher = Launcher(files, folder / "outputs")
        port = free_port()
        self._proxies = {name: stack.enter_context(FaultyProxy(port)) for name in SITES}
        self._federation = Federation(
            files,
            self._launcher,
            base,
            data,
            sites=SITES,
            tables={
                "rounds": {"count": rounds, "timeout": 12.0},
                "secagg": {"stage-timeout": 8.0},
            },
            listen={"port": port, "patience": 2.0},
            reach={name: f"127.0.0.1:{proxy.port}" for name, proxy in self._proxies.items()},
        )
        self._disks = {name: disk for name in SITES if (disk := _mount(folder / name, stack))}
        for name, disk in self._disks.items():
            self._federation.move_memory(name, disk)
        self._undo: list[tuple[float, int, Callable[[], None]]] = []
        self._server = self._federation.server()
        self._clients = {name: self._federation.warm_client(name) for name in SITES}
        # Called before the disks are taken away.
        stack.callback(self._launcher.end_all)

    def tend(self) -> str | None:
        """Undo what is due, start again what has ended; how the run has ended, if it has."""
        while self._undo and self._undo[0][0] <= time.monotonic():
            heapq.heappop(self._undo)[2]()
        server = self._server
        if server.running:
            for name, client in self._clients.items():
                if not client.running:
                    code = client.wait()
                    assert code in (0, -signal.SIGKILL), f"{name} has ended with {code}"
                    self._clients[name] = self._federation.warm_client(name)
            return None
        code, said = server.wait(), server.stderr
        if code == 0:
            return "finished"
        if "rounds in a row came to nothing" in said:
            return "given up"
        known = code == -signal.SIGKILL or "SuperLink has ended" in said
        assert known, f"the server has ended with {code}"
        self._server = self._federation.restart_server(server)
        return None

    def strike(self, fault: Fault) -> bool:
        """Let it happen; whether there was anything that it could happen to."""
        server, client = self._server, self._clients[fault.site]
        proxy, training = self._proxies[fault.site], client.workers()
        if fault.kind == "kill server":
            server.kill()
        elif fault.kind == "kill superlink":
            return self._signal(server.workers(), signal.SIGKILL)
        elif fault.kind == "kill client":
            client.kill()
        elif fault.kind == "kill training":
            return self._signal(training, signal.SIGKILL)
        elif fault.kind == "stop training":
            self._later(fault, lambda: self._signal(training, signal.SIGCONT))
            return self._signal(training, signal.SIGSTOP)
        elif fault.kind == "stop client":
            self._later(fault, lambda: self._signal([client.pid], signal.SIGCONT))
            return self._signal([client.pid], signal.SIGSTOP)
        elif fault.kind == "cut":
            proxy.cut()
        elif fault.kind == "stall":
            proxy.stall(True)
            self._later(fault, lambda: proxy.stall(False))
        elif fault.kind == "delay":
            proxy.delay(0.3)
            self._later(fault, lambda: proxy.delay(0.0))
        elif fault.kind == "truncate":
            proxy.truncate()
        else:
            return self._fill(fault)
        return True

    def calm_down(self) -> None:
        """Undo everything now."""
        while self._undo:
            heapq.heappop(self._undo)[2]()

    def check(self, how: str) -> None:
        """Assert what must hold at the end of a run."""
        if how == "finished":
            self._federation.check_finished()
        else:
            self._federation.check()

    def story(self) -> str:
        """What everybody said last."""
        parts = []
        for command in self._launcher.commands:
            lines = command.stderr.splitlines()[-LINES:]
            parts.append("\n  ".join([f"--- {command.folder}", *lines]))
        return "\n".join(parts)

    def _fill(self, fault: Fault) -> bool:
        disk = self._disks.get(fault.site)
        if disk is None:
            return False
        filler = disk / "filler"
        with filler.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        self._later(fault, lambda: filler.unlink(missing_ok=True))
        return True

    def _later(self, fault: Fault, undo: Callable[[], object]) -> None:
        entry = (time.monotonic() + fault.seconds, len(self._undo), undo)
        heapq.heappush(self._undo, entry)

    @staticmethod
    def _signal(pids: list[int], number: signal.Signals) -> bool:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        return bool(pids)


def _mount(folder: Path, stack: ExitStack) -> Path | None:
    """A file system of its own for a site's memory, which can be filled; None if not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        return None
    stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=20, help="of one run")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fedtune-chaos-"))
    base = write_tiny_base(folder / "base")
    data = write_clients(folder / "data", *read_icd_rows())
    chaos = Chaos(folder / "runs", base, data, options.rounds, lambda text: print(text, flush=True))
    try:
        chaos.run(options.seed, options.seconds)
    except AssertionError as error:
        sys.exit(f"{error}\nseed {options.seed}; the files are in {folder}")
    print(
        f"{len(chaos.ends)} runs: {Counter(chaos.ends)}; {chaos.struck.total()} faults: "
        f"{dict(chaos.struck)}"
    )


if __name__ == "__main__":
    main()
