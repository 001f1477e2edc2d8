"""`fedtune client`: one site. It talks to the network, and leaves training to its worker.

This process imports no torch and holds no data; all that it can do is carry bytes.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType

from fedtune.deploy.base_fetch import Say, fetch_base
from fedtune.deploy.participation import NOT_NOW, NotNow, Participation
from fedtune.deploy.site_files import SiteFiles
from fedtune.deploy.worker import TRAINING, Worker
from fedtune.errors import (
    AuditWriteError,
    JobError,
    KeyFileError,
    NetworkError,
    ServerRefused,
    ServerUnreachable,
    WireError,
)
from fedtune.flower.envelope import (
    CLIENT_FAILED,
    CLIENT_REFUSED,
    CONVERSATION,
    FAREWELL,
    failure,
    reply,
    unwrap,
)
from fedtune.flower.internals import take_over_log
from fedtune.flower.network import HEARTBEAT_SECONDS, NodeConnection
from fedtune.flower.pieces import PIECE

from flwr.app import Message, MessageType  # isort: skip

# While a round is on, and when nothing came for some time.
POLL_SECONDS, IDLE_POLL_SECONDS, BUSY_SECONDS = 0.06, 0.4, 3.0
PAUSE_PER_ANSWER = 4  # in units of the time that the fastest of so many answers took
ANSWERS_COMPARED = 4
SHORTEST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
PUSH_TRIES = 5
# The server looks for answers ten times a second, if it has not to do with a large one.
SHORTEST_FETCH, FETCH_SECONDS, LONGEST_LEAVE = 0.5, 5.0, 10.0
LONGEST_FAREWELL = 200
TELL_SECONDS = 10.0  # between two lines about a message that takes long
QUESTIONS = {
    MessageType.QUERY: b"h",
    CONVERSATION: b"c",
    MessageType.TRAIN: b"t",
    MessageType.EVALUATE: b"e",
}
logger = logging.getLogger(__name__)


class _Stopped(BaseException):
    """Someone ends this process."""


def run_client(path: Path, once: bool, say: Say, training: Sequence[str] = TRAINING) -> int:
    """Take part until stopped, or with `once` until the run is over; returns the exit code.

    `training` is the command of the process that trains, which gets `path` as an argument.
    """
    signal.signal(signal.SIGTERM, _stop)
    try:
        return _take_part(path, once, say, training)
    except _Stopped:
        say("stopped")
        return 0
    except KeyboardInterrupt:
        say("stopped")
        return 130


def _take_part(path: Path, once: bool, say: Say, training: Sequence[str]) -> int:
    files = SiteFiles.read(path)
    keys, members = files.keys(), files.members()
    certificate = files.find(files.config.site.certificate)
    try:
        authority = certificate.read_bytes()
    except OSError as error:
        raise KeyFileError(f"{certificate}: cannot be read: {error.strerror}") from error
    take_over_log()
    site = files.config.site
    participation = Participation(files, say)
    participation.wait()
    fetch_base(files, authority, keys.transport, say)
    while True:
        # Who takes no part has no training process: its memory is the owner's.
        with ExitStack() as stack:
            with participation.working():
                worker = stack.enter_context(Worker(path, training))
            participation.join(worker)
            say(f"{site.name}: {worker.words}; roster {members.roster.digest.hex()[:16]}")
            connection = NodeConnection(
                site.server, authority, keys.transport, worker.largest, _Transfer(say).tell
            )
            stack.callback(connection.close)
            try:
                return _Site(connection, worker, participation, once, say, site.server).run()
            except (NotNow, _Stopped, KeyboardInterrupt) as ended:
                connection.leave()
                if not isinstance(ended, NotNow):
                    raise
        participation.wait()


class _Transfer:
    """Says how far a large message has got."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._told = time.monotonic()

    def tell(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == 1:
            self._told = now
        elif now - self._told > TELL_SECONDS:
            self._told = now
            self._say(f"{done * PIECE >> 20} of about {total * PIECE >> 20} MiB went over the line")


class _Site:
    def __init__(
        self,
        connection: NodeConnection,
        worker: Worker,
        participation: Participation,
        once: bool,
        say: Say,
        server: str,
    ) -> None:
        self._connection, self._worker = connection, worker
        self._participation = participation
        self._once, self._say, self._server = once, say, server
        self._lost = threading.Event()
        self._refusals = 0
        self._stay_until = 0.0  # what was said last may not be with the server before

    def run(self) -> int:
        """Connect, serve, and connect again; raises `NotNow` when it is time to leave."""
        try:
            return self._run()
        except NotNow:
            with suppress(NetworkError):
                self._take_leave()
            raise

    def _take_leave(self) -> None:
        """Decline what is asked, until the server has what was answered last.

        Of a site that has left, Flower's SuperLink gives no answers any more. And for one to a
        question that is on its way already the server would wait.
        """
        longest = time.monotonic() + LONGEST_LEAVE
        while time.monotonic() < longest:
            if (message := self._connection.pull()) is not None:
                self._decline(message)
            elif time.monotonic() >= self._stay_until:
                return
            else:
                time.sleep(POLL_SECONDS)

    def _decline(self, message: Message) -> None:
        self._push(failure(message, CLIENT_REFUSED, NOT_NOW), 0.0, 1)
        self._stay_until = max(self._stay_until, time.monotonic() + SHORTEST_FETCH)

    def _run(self) -> int:
        pause, told = SHORTEST_PAUSE, ""
        while True:
            self._participation.look()
            try:
                self._connection.activate()
            except ServerUnreachable as error:
                if str(error) != told:
                    told = str(error)
                    self._say(f"{self._server} does not answer, trying on: {error}")
                time.sleep(pause)
                pause = min(LONGEST_PAUSE, pause * 1.5)
                continue
            pause, told = SHORTEST_PAUSE, ""
            offset = self._connection.clock_offset
            clocks = f"; its clock is {offset:+.0f} s from ours" if abs(offset) > 60 else ""
            self._say(f"connected to {self._server}{clocks}")
            try:
                return self._serve()
            except NetworkError as error:
                self._say(f"connection lost, trying on: {error}")
                told = str(error)
                # To be refused again and again has a reason that does not go away.
                self._refusals = self._refusals + 1 if isinstance(error, ServerRefused) else 0
                if self._refusals > 3:
                    raise
                time.sleep(SHORTEST_PAUSE)

    def _serve(self) -> int:
        self._lost.clear()
        done = threading.Event()
        beats = threading.Thread(target=self._beat, args=(done,), daemon=True)
        beats.start()
        heard = time.monotonic()
        took = deque([0.0], ANSWERS_COMPARED)
        try:
            while not self._lost.is_set():
                self._participation.look()
                asked = time.monotonic()
                message = self._connection.pull()
                if message is None:
                    now = time.monotonic()
                    pause = POLL_SECONDS if now - heard < BUSY_SECONDS else IDLE_POLL_SECONDS
                    # A server that is always slow to say that there is nothing has too many who
                    # ask; one that is slow now and then has other things to do.
                    took.append(now - asked)
                    time.sleep(max(pause, PAUSE_PER_ANSWER * min(took)))
                    continue
                self._refusals = 0
                over = message.metadata.message_type == FAREWELL and self._once
                try:
                    self._answer(message)
                except ServerUnreachable:
                    if not over:  # who has said farewell need not be there for the answer
                        raise
                if over:
                    self._connection.leave()
                    return 0
                heard = time.monotonic()
            raise ServerUnreachable("no heartbeat gets through")
        finally:
            done.set()
            beats.join()

    def _answer(self, message: Message) -> None:
        metadata = message.metadata
        started = time.monotonic()
        try:
            answer = self._reply(message)
        except AuditWriteError:
            # As if killed: the open request comes again, and is answered then.
            self._connection.leave()
            raise
        except NotNow:
            # Told so, nobody waits for what does not come.
            with suppress(NetworkError):
                self._decline(message)
            raise
        what = f"round {metadata.group_id}: {metadata.message_type}" if metadata.group_id else ""
        if answer.has_error():
            self._say(f"{what or metadata.message_type} refused: {answer.error.reason}")
        elif metadata.message_type == "train":
            self._say(f"{what}ed in {time.monotonic() - started:.1f} s")
        tries = 1 if metadata.message_type == FAREWELL else PUSH_TRIES
        well = not answer.has_error()
        self._push(answer, time.monotonic() - started, tries)
        self._stay_until = time.monotonic() + FETCH_SECONDS
        self._participation.answered(well)

    def _reply(self, message: Message) -> Message:
        kind = message.metadata.message_type
        try:
            if kind == FAREWELL:
                words = unwrap(message)[:LONGEST_FAREWELL].decode(errors="replace")
                self._say(f"the run is over: {words}")
                return reply(message, b"")
            if kind not in QUESTIONS:
                raise WireError(f"not a question for a site: {kind}")
            self._participation.asked(kind, unwrap(message))
            with self._participation.working():
                self._worker.ask(QUESTIONS[kind], unwrap(message))
                # The answer is as large, and not both have to be here.
                message.content.clear()
                answer = self._worker.answer(self._participation.look)
            return reply(message, answer)
        except WireError as error:
            return failure(message, CLIENT_REFUSED, str(error))
        except JobError as error:
            return failure(message, CLIENT_FAILED, str(error))

    def _push(self, answer: Message, seconds: float, tries: int) -> None:
        for tried in range(1, tries + 1):
            try:
                self._connection.push(answer, seconds)
            except ServerUnreachable as error:
                if tried == tries:
                    raise
                logger.info("an answer did not get through: %s", error)
                time.sleep(tried)
            except ServerRefused as error:
                logger.info("an answer came too late: %s", error)
                return
            else:
                return

    def _beat(self, done: threading.Event) -> None:
        missed = 0
        while not done.wait(HEARTBEAT_SECONDS / 2):
            try:
                self._connection.beat()
                missed = 0
            except ServerUnreachable:
                missed += 1
            except ServerRefused:
                missed = 99
            if missed > 2:
                self._lost.set()
                return


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise _Stopped
