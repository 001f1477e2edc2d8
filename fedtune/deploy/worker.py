"""A site's training process, seen from the process that talks to the network and starts it.

Requests and answers go over a pair of pipes: a letter for the question, or for how it went, and
the request, the answer, or a sentence. Nothing here imports torch.
"""

from __future__ import annotations

import json
import logging
import os
import select
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Self

from fedtune.errors import AuditWriteError, JobError, UsageError, WireError

_HEAD = struct.Struct("<cQ")
_LARGEST = 1 << 34
TRAINING = (sys.executable, "-m", "fedtune.deploy.training")
QUESTIONS = {b"h": "hello", b"c": "converse", b"t": "train", b"e": "evaluate"}
READY, ANSWER, REFUSAL, FAILURE, CRASH, STOP = b"r", b"a", b"w", b"f", b"x", b"s"
logger = logging.getLogger(__name__)


class Worker:
    """The training process of a site, seen from the one that talks to the network."""

    def __init__(self, path: Path, command: Sequence[str] = TRAINING) -> None:
        """Start `command`; raises `UsageError` with what it finds wrong in the site's files."""
        self._command = [*command, str(path)]
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(  # noqa: S603  # this interpreter, this package
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        kind, said = self._read()
        if kind != READY:
            self.close()
            raise UsageError(said.decode())
        ready = json.loads(said)
        self.words: str = ready["words"]
        self.largest: int = ready["largest"]  # bytes of a request that it could ever take

    def ask(self, question: bytes, payload: bytes) -> None:
        """Send a request, which is then not held here; `answer` follows.

        Raises `JobError` if there is nobody to ask.
        """
        if self._process.poll() is not None:
            # It ended while nobody asked, or could not be started again the last time.
            self._restart()
        with suppress(BrokenPipeError):  # that it has ended is found when the answer is read
            write_frame(self._pipe(self._process.stdin), question, payload)

    @property
    def pid(self) -> int:
        """Of the process as it is now."""
        return self._process.pid

    def answer(self, meanwhile: Callable[[], None] = lambda: None) -> bytes:
        """The answer to what was asked; until it is there, `meanwhile` is called every second.

        Raises `WireError` if it is refused, `JobError` if there is none, `AuditWriteError` if
        this site must stop. If `meanwhile` raises anything, all that is left to do is to close.
        """
        watched = select.poll()
        # Of an answer nothing is in the pipe's buffer: there is one to each request.
        watched.register(self._pipe(self._process.stdout), select.POLLIN)
        while not watched.poll(1000):
            meanwhile()
        kind, said = self._read()
        if kind == ANSWER:
            return said
        if kind == REFUSAL:
            raise WireError(said.decode())
        if kind == STOP:
            raise AuditWriteError(said.decode())
        if kind == FAILURE:
            raise JobError(said.decode())
        logger.error("%s; it is started again", said.decode())
        self.close()
        self._restart()
        raise JobError("the training process ended")

    def close(self) -> None:
        """End it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # of what was not written any more
                    pipe.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _restart(self) -> None:
        try:
            self._start()
        except UsageError as error:
            # It can name a file or quote a row, and what is raised here goes to the server.
            logger.error("the training process does not start: %s", error)
            raise JobError("the training process does not start") from error

    def _read(self) -> tuple[bytes, bytes]:
        found = read_frame(self._pipe(self._process.stdout))
        return found or (CRASH, f"the training process ended ({self._process.wait()})".encode())

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        if pipe is None:
            raise RuntimeError("the training process has no pipe")
        return pipe


def end_with(requests: int) -> None:
    """End this process when nobody can send it requests any more, whatever it is at.

    Nobody waits for its answer, and the site's next process needs the audit log.
    """
    watched = select.poll()
    watched.register(requests, 0)  # hang-ups are always told
    watched.poll()
    os._exit(0)


def write_frame(pipe: IO[bytes], kind: bytes, payload: bytes) -> None:
    pipe.write(_HEAD.pack(kind, len(payload)))
    pipe.write(payload)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> tuple[bytes, bytes] | None:
    head = pipe.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    kind, length = _HEAD.unpack(head)
    if length > _LARGEST:
        raise JobError(f"a message of {length} bytes between two processes of this site")
    payload = pipe.read(length)
    return None if len(payload) < length else (kind, payload)
