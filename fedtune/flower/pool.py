"""Worker processes forked from this one, so that they share the base model in memory.

One worker per core, each with one thread: a small batch scales badly over threads. A worker
does one task at a time; what it is doing when it dies or takes too long is that task's failure
and no other's.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Protocol

Handler = Callable[[bytes], bytes]
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Task:
    """Call handler `kind` with `payload`; `key` names the task in what comes back."""

    key: int
    kind: str
    payload: Callable[[], bytes]  # made when a worker is free, so that few wait in memory


@dataclass(frozen=True)
class Failed:
    """Why a task has no result."""

    reason: str


class Pool(Protocol):
    """Runs tasks; results come as they are ready."""

    @property
    def size(self) -> int:
        """How many tasks run at a time."""

    def run(
        self, tasks: Iterable[Task], timeout: float | None = None
    ) -> Iterator[tuple[int, bytes | Failed]]:
        """Key and result of each task, in order of completion; `timeout` is per task."""

    def close(self) -> None:
        """End the workers."""


class InlinePool:
    """Runs tasks in this process, one after another; a task cannot time out."""

    size = 1

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self._handlers = handlers

    def run(
        self, tasks: Iterable[Task], timeout: float | None = None
    ) -> Iterator[tuple[int, bytes | Failed]]:
        """See `Pool.run`."""
        for task in tasks:
            yield task.key, _unpack(_call(self._handlers[task.kind], task.payload()))

    def close(self) -> None:
        """Nothing to end."""


@dataclass
class _Worker:
    pid: int
    pipe: Connection
    task: Task | None = None
    deadline: float | None = None


class ForkPool:
    """Worker processes forked from this one; a worker that dies is replaced."""

    def __init__(self, handlers: Mapping[str, Handler], size: int, start: Handler | None = None):
        """Fork `size` workers; `start` is called once in each with nothing, after the fork."""
        self._handlers = handlers
        self._start = start
        # Objects that exist now are shared with the workers; a collection would touch, and so
        # copy, every page of them.
        gc.collect()
        gc.freeze()
        self._workers: list[_Worker] = []
        for _ in range(size):
            self._workers.append(self._fork())

    @property
    def size(self) -> int:
        """Number of workers."""
        return len(self._workers)

    def run(
        self, tasks: Iterable[Task], timeout: float | None = None
    ) -> Iterator[tuple[int, bytes | Failed]]:
        """See `Pool.run`. If the caller stops early, running tasks are ended."""
        queue = deque(tasks)
        try:
            for worker in self._workers:
                self._give(worker, queue, timeout)
            while busy := [worker for worker in self._workers if worker.task]:
                soonest = min((w.deadline for w in busy if w.deadline is not None), default=None)
                patience = None if soonest is None else max(0.0, soonest - time.monotonic())
                wait([worker.pipe for worker in busy], patience)
                for worker in busy:
                    # Asked anew: time passes while the caller looks at another's result, and an
                    # answer that came in that time is not late.
                    if worker.pipe.poll():
                        yield from self._collect(worker, queue, timeout)
                    elif worker.deadline is not None and time.monotonic() > worker.deadline:
                        yield from self._expire(worker, queue, timeout)
        finally:
            for place, worker in enumerate(self._workers):
                if worker.task:
                    self._end(worker)
                    self._workers[place] = self._fork()

    def close(self) -> None:
        """End the workers and wait for them."""
        for worker in self._workers:
            self._end(worker)
        self._workers = []

    def _give(self, worker: _Worker, queue: deque[Task], timeout: float | None) -> None:
        """Send the next task, if there is one, to an idle worker."""
        if not queue:
            return
        task = queue.popleft()
        data = task.kind.encode() + b"\0" + task.payload()
        try:
            worker.pipe.send_bytes(data)
        except (BrokenPipeError, ConnectionResetError):
            self._replace(worker)  # it died while idle, which is no fault of this task
            worker.pipe.send_bytes(data)
        worker.task = task
        worker.deadline = None if timeout is None else time.monotonic() + timeout

    def _collect(
        self, worker: _Worker, queue: deque[Task], timeout: float | None
    ) -> Iterator[tuple[int, bytes | Failed]]:
        task = worker.task
        if task is None:
            return
        result: bytes | Failed
        try:
            result = _unpack(worker.pipe.recv_bytes())
            worker.task = None
        except (EOFError, ConnectionResetError):
            result = Failed(self._replace(worker))
        # The next task first: the worker computes while the caller looks at this result.
        self._give(worker, queue, timeout)
        yield task.key, result

    def _expire(
        self, worker: _Worker, queue: deque[Task], timeout: float | None
    ) -> Iterator[tuple[int, bytes | Failed]]:
        task = worker.task
        self._replace(worker)
        self._give(worker, queue, timeout)
        if task is not None:
            yield task.key, Failed(f"no answer within {timeout:g} s")

    def _replace(self, worker: _Worker) -> str:
        """Put a fresh process in the worker's place; returns in words how the old one ended."""
        status = self._end(worker)
        fresh = self._fork()
        worker.pid, worker.pipe, worker.task, worker.deadline = fresh.pid, fresh.pipe, None, None
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return f"its process was ended by {name}{hint}"
        return f"its process ended with status {os.waitstatus_to_exitcode(status)}"

    def _end(self, worker: _Worker) -> int:
        """End a worker's process if it still runs; returns its wait status."""
        worker.pipe.close()
        pid, status = os.waitpid(worker.pid, os.WNOHANG)
        if pid == 0:
            os.kill(worker.pid, signal.SIGKILL)
            _, status = os.waitpid(worker.pid, 0)
        return status

    def _fork(self) -> _Worker:
        ours, theirs = Pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            theirs.close()
            return _Worker(pid, ours)
        try:
            ours.close()
            for sibling in self._workers:
                # Else the sibling would not see the end of its pipe when the parent dies.
                sibling.pipe.close()
            self._serve(theirs)
        finally:
            os._exit(0)  # none of the parent's clean-up is this process's to do
        raise AssertionError("unreachable")

    def _serve(self, pipe: Connection) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if sys.platform == "linux":
            # A parent that is killed takes its workers along, in the middle of a step too.
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        started = _call(self._start, b"") if self._start else b"+"
        while True:
            try:
                kind, _, payload = pipe.recv_bytes().partition(b"\0")
                usable = started[:1] == b"+"
                answer = _call(self._handlers[kind.decode()], payload) if usable else started
                pipe.send_bytes(answer)
            except (EOFError, BrokenPipeError, ConnectionResetError):
                return


def _call(handler: Handler, payload: bytes) -> bytes:
    """The handler's result, or why there is none, told apart by the first byte."""
    try:
        return b"+" + handler(payload)
    except Exception as error:  # whatever a task raises is that task's failure
        return b"-" + (str(error) or type(error).__name__).encode(errors="backslashreplace")


def _unpack(answer: bytes) -> bytes | Failed:
    return answer[1:] if answer[:1] == b"+" else Failed(answer[1:].decode())
