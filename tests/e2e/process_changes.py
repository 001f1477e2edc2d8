"""What a test changes in a `fedtune` process of its own before the command line runs.

See `Launcher.warm`. What such a process forks later has the change too.
"""

from __future__ import annotations

import ctypes
import datetime
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

_FORK = multiprocessing.get_context("fork")


_CLONE_NEWNET = 0x40000000


def shift_clock(seconds: float) -> None:
    """As if this machine's clock were ahead by so much."""
    ahead, real, real_time = datetime.timedelta(seconds=seconds), datetime.datetime, time.time

    class Shifted(real):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return real.now(tz) + ahead

    datetime.datetime = Shifted  # type: ignore[misc]
    time.time = lambda: real_time() + seconds


def speak_wire_version(version: int) -> None:
    """As if this were another version of fedtune."""
    from fedtune.wire import codec, envelope, strict

    for module in (codec, envelope, strict):
        module.WIRE_VERSION = version  # type: ignore[attr-defined]


def look_often() -> None:
    """As if a site looked at its machine all the time, and took its leave in half a second."""
    from fedtune.deploy import client, participation

    participation.LOOK_SECONDS = 0.1
    client.FETCH_SECONDS = client.SHORTEST_FETCH


def enter_namespace(name: str) -> None:
    """Go to a network namespace that `ip netns add` has made."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.open(Path("/run/netns") / name, os.O_RDONLY)
    try:
        if libc.setns(handle, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {name}")
    finally:
        os.close(handle)


def fork_training() -> None:
    """From now on fork the training process of this site, instead of starting an interpreter.

    It is a process of its own with the same pipes, arguments and `main`. Only the seconds of
    importing torch are saved; `test_deploy.py` pays for them.
    """
    from fedtune.deploy import worker

    expired = subprocess.TimeoutExpired
    worker.subprocess = SimpleNamespace(  # type: ignore[assignment]
        Popen=_Forked, PIPE=subprocess.PIPE, TimeoutExpired=expired
    )


class _Forked:
    """What `fedtune.deploy.worker` uses of `subprocess.Popen`."""

    def __init__(self, command: Sequence[str], stdin: int, stdout: int) -> None:
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        arguments = list(command)[2:]
        self._process = _FORK.Process(target=_main, args=(arguments, requests, answers))
        self._process.start()
        os.close(requests)
        os.close(answers)
        self.stdin, self.stdout = os.fdopen(self._requests, "wb"), os.fdopen(self._answers, "rb")

    @property
    def pid(self) -> int:
        pid: int = self._process.pid
        return pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("training", timeout or 0.0)
        return code

    def kill(self) -> None:
        self._process.kill()


def _main(arguments: list[str], requests: int, answers: int) -> None:
    os.dup2(requests, 0)
    os.dup2(answers, 1)
    # Neither the pipes' other ends, nor the connection to the server.
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    sys.stdin, sys.stdout = os.fdopen(0, "r", closefd=False), os.fdopen(1, "w", closefd=False)
    sys.argv = arguments
    from fedtune.deploy.training import main

    main()
