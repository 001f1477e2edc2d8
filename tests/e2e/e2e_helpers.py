"""Real `fedtune` processes: started, watched, killed; and what they leave on the disk.

Two ways to start one. `cold` is the installed command as a person runs it; importing torch and
transformers takes it seconds. `warm` is a process forked from a server that has imported them
already and then runs the same `fedtune.cli.main`, so a test can afford many.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

DEADLINE = 120.0  # far beyond what any of these takes on a slow machine
POLL = 0.01

_WARM = multiprocessing.get_context("forkserver")
_WARM.set_forkserver_preload(
    [
        "peft",
        "transformers",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.bert.modeling_bert",
        "transformers.models.bert.tokenization_bert",
        "fedtune.cli",
        "fedtune.deploy.client",
        "fedtune.deploy.server",
        "fedtune.deploy.training",
        "fedtune.simulation.api",
        "fedtune.simulation.commands",
        "fedtune.simulation.results",
        "fedtune.report.tensorboard",
        "tensorboard.summary.writer.record_writer",
        "matplotlib.backends.backend_svg",
        "matplotlib.style",
        "jinja2",
        "dp_accounting.rdp",
    ]
)


class _Handle(Protocol):
    """What `subprocess.Popen` and `multiprocessing.Process` have in common, by our names."""

    @property
    def pid(self) -> int: ...

    def wait(self, timeout: float) -> int | None: ...


def _listen_to_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class _Cold:
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait(self, timeout: float) -> int | None:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None


@dataclass(frozen=True)
class _Warm:
    process: Any

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def wait(self, timeout: float) -> int | None:
        self.process.join(timeout)
        code: int | None = self.process.exitcode
        return code


@dataclass(frozen=True)
class Command:
    """A started `fedtune` process, the leader of its own process group."""

    handle: _Handle
    folder: Path

    @property
    def pid(self) -> int:
        return self.handle.pid

    @property
    def running(self) -> bool:
        return self.handle.wait(0) is None

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def wait(self, timeout: float = DEADLINE) -> int:
        """The exit code; negative: the signal that ended it."""
        code = self.handle.wait(timeout)
        if code is None:
            self.kill()
            raise AssertionError(f"still running after {timeout} s; it said: {self.stderr}")
        return code

    def workers(self) -> list[int]:
        """The processes that this one has forked."""
        return [pid for pid, (parent, _) in _processes().items() if parent == self.pid]

    def kill(self) -> None:
        """SIGKILL to this one process, not to its workers."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.handle.wait(DEADLINE)

    def interrupt(self) -> None:
        """What a terminal does on Ctrl-C: SIGINT to the whole process group."""
        os.killpg(self.pid, signal.SIGINT)


class Launcher:
    """Starts commands in one working directory and ends those that a test left running."""

    def __init__(self, folder: Path, outputs: Path) -> None:
        self.folder = folder
        self._outputs = outputs
        self._started: list[Command] = []

    def cold(self, *arguments: str | Path, python: Path | None = None) -> Command:
        """Start the installed command, or that of another environment, with this tree's code."""
        out = self._output()
        command: list[str | Path] = [Path(sys.executable).with_name("fedtune")]
        environment = dict(os.environ)
        if python is not None:
            command = [python, "-m", "fedtune.cli"]
            environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
        with (out / "stdout").open("wb") as stdout, (out / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                [*command, *map(str, arguments)],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                # As from a terminal: a shell's background job would inherit an ignored SIGINT.
                preexec_fn=_listen_to_ctrl_c,  # noqa: PLW1509 - no thread of ours holds a lock
            )
        return self._watch(_Cold(process), out)

    def warm(
        self,
        *arguments: str | Path,
        audit: Audit | None = None,
        prepare: Iterable[Callable[[], None]] = (),
    ) -> Command:
        """Start the same command in a process that has its imports already.

        Each of `prepare`, a function that can be pickled, is called in that process before.
        """
        out = self._output()
        words = [str(argument) for argument in arguments]
        process = _WARM.Process(target=_main, args=(words, self.folder, out, audit, tuple(prepare)))
        process.start()
        # Without its own group it would get no Ctrl-C, or pytest would get it too.
        wait_until(lambda: _is_leader(process.pid), "the process to lead its group")
        return self._watch(_Warm(process), out)

    def run(self, *arguments: str | Path, audit: Audit | None = None) -> tuple[int, Command]:
        """Start a warm command and wait for its end; exit code and command."""
        command = self.warm(*arguments, audit=audit)
        return command.wait(), command

    @property
    def commands(self) -> list[Command]:
        """All that were started, ended ones too."""
        return list(self._started)

    def end_all(self) -> None:
        for command in self._started:
            if command.running:
                command.kill()

    def _output(self) -> Path:
        folder = self._outputs / f"{len(self._started)}"
        folder.mkdir(parents=True)
        return folder

    def _watch(self, handle: _Handle, out: Path) -> Command:
        self._started.append(Command(handle, out))
        return self._started[-1]


@dataclass(frozen=True)
class Audit:
    """Watch what a warm process does to files under `folder`; SIGKILL it just before one of it.

    `log` gets one line per change (what, where); `kill_at` counts them from 1, 0 is never.
    """

    folder: Path
    log: Path
    kill_at: int = 0


_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "sqlite3.connect"}
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _install(audit: Audit) -> None:
    """Python itself announces every change of a file, so no product code is replaced."""
    own, count = os.getpid(), 0
    log = os.open(audit.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    base = str(audit.folder.resolve())  # the hook itself must ask nothing of the file system

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in _CHANGES and not (event == "open" and _writes(arguments[2])):
            return
        path = os.path.relpath(str(arguments[0]), base)
        if os.getpid() != own or path.startswith(".."):
            return
        count += 1
        os.write(log, f"{event} {path}\n".encode())
        if count == audit.kill_at:
            os.kill(own, signal.SIGKILL)

    sys.addaudithook(hook)


def _writes(flags: object) -> bool:
    return isinstance(flags, int) and bool(flags & _WRITE_FLAGS)


def _main(
    arguments: list[str],
    cwd: Path,
    out: Path,
    audit: Audit | None,
    prepare: tuple[Callable[[], None], ...],
) -> None:
    """In the warm process: become a command of its own and run the command line."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        file = os.open(out / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.chdir(cwd)
    os.setsid()
    if audit:
        _install(audit)
    for change in prepare:
        change()
    from fedtune.cli import main

    sys.argv = ["fedtune", *arguments]
    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _is_leader(pid: int) -> bool:
    try:
        return os.getpgid(pid) == pid
    except ProcessLookupError:
        return True  # it came and went


def _processes() -> dict[int, tuple[int, str]]:
    """Parent and state of every process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                # The name may hold spaces and brackets; what follows the last bracket does not.
                state, parent, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
                found[int(entry.name)] = (int(parent), state)
    return found


def wait_until(condition: Callable[[], object], what: str, timeout: float = DEADLINE) -> None:
    """Poll until `condition` holds; an assertion fails if it does not in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s for {what}"
        time.sleep(POLL)


def wait_gone(pids: Sequence[int], timeout: float = 60.0) -> None:
    """Poll until none of the processes runs; one that only waits to be reaped is gone."""

    def alive() -> list[int]:
        now = _processes()
        return [pid for pid in pids if pid in now and now[pid][1] != "Z"]

    wait_until(lambda: not alive(), f"processes {list(pids)} to end", timeout)


def line_count(path: Path) -> int:
    """Whole lines of a file that may not be there yet."""
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def tree(folder: Path) -> dict[str, str]:
    """Every name under a folder, hidden ones too, with a digest of its content."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def adapter_bytes(run: Path) -> bytes:
    """The weights of a run, as they are on the disk."""
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def adapter_tensors(run: Path) -> Mapping[str, NDArray[np.float32]]:
    from safetensors.numpy import load_file

    return load_file(run / "adapter" / "adapter_model.safetensors")


def read_summary(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_journal(run: Path) -> list[dict[str, Any]]:
    """The records in the journal, read without fedtune."""
    import sqlite3

    with sqlite3.connect(run / "journal.db") as database:
        rows = database.execute("SELECT record FROM rounds WHERE round > 0 ORDER BY round")
        return [json.loads(text) for (text,) in rows]


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
