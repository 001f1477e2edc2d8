"""One client's stream, at the server: who it is, what it asks, what it is told."""

from __future__ import annotations

import asyncio
import itertools
import logging
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, cast

import grpc
import numpy as np
from grpc.aio import EOF, ServicerContext

from fedtune.config import Limits
from fedtune.errors import BadSignature, ContextMismatch, MalformedMessage
from fedtune.secagg.keys import Roster
from fedtune.split.batcher import Batcher
from fedtune.split.compute import Result, Work
from fedtune.split.counters import Counters
from fedtune.split.introduction import check_introduction, new_challenge
from fedtune.split.waiting import NotAnswered
from fedtune.train.activations import Encoding, OutputCoding, decode, encode
from fedtune.train.channel import LABEL_BYTES, CutTraffic
from fedtune.wire.split import (
    Answer,
    Description,
    FromClient,
    FromServer,
    Introduction,
    Kind,
    Reason,
    Refusal,
    Request,
    Upstream,
    Welcome,
    decode_from_client,
    encode_from_server,
)

logger = logging.getLogger(__name__)
Context = ServicerContext[bytes, bytes]
Code = grpc.StatusCode
_ids = itertools.count(1)


@dataclass(frozen=True)
class Host:
    """What the streams of a server have in common."""

    description: Description
    roster: Roster
    limits: Limits
    batcher: Batcher
    counters: Counters

    @property
    def encoding(self) -> Encoding:
        """Of embeddings and their gradients."""
        return cast(Encoding, self.description.terms.encoding)

    @property
    def outputs(self) -> OutputCoding:
        """Of outputs and their gradients."""
        return OutputCoding(self.description.terms.rungs, self.encoding)


@dataclass(frozen=True)
class _Passed:
    """What a request has carried up to now."""

    kind: Kind
    lengths: np.ndarray[Any, np.dtype[np.int64]]
    up: int
    down: int = 0


class Ended(Exception):  # not an error of this side
    """A stream is over, and this is what its client is told."""

    def __init__(self, code: Code, words: str) -> None:
        super().__init__(words)
        self.code, self.words = code, words


class Session:
    """All of it happens on the server's event loop."""

    def __init__(self, host: Host, context: Context) -> None:
        self._host, self._context = host, context
        self._id = next(_ids)
        self._last = 0
        self._answering: set[asyncio.Task[None]] = set()
        self._opened: dict[int, _Passed] = {}  # requests whose second step is awaited
        self._writing = asyncio.Lock()
        self._ending: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self._stalled = False
        self.name = ""

    @property
    def pending(self) -> int:
        """Requests that are not answered yet, or whose second step is awaited."""
        return len(self._answering) + self._host.batcher.kept(self._id)

    def end(self, code: Code, words: str) -> None:
        """End the stream; `words` say to the client why."""
        if not self._ending.done():
            self._ending.set_result(Ended(code, words))

    async def introduced(self) -> str:
        """The name of the client, which has proven it; raises `Ended`."""
        challenge, host = new_challenge(), self._host
        await self._write(challenge)
        said = await self._hear(host.limits.handshake)
        if not isinstance(said, Introduction):
            raise Ended(Code.INVALID_ARGUMENT, "an introduction comes first")
        try:
            check_introduction(said, challenge, host.roster, host.description.terms)
        except BadSignature as error:
            raise Ended(Code.UNAUTHENTICATED, str(error)) from error
        except ContextMismatch as error:
            raise Ended(Code.FAILED_PRECONDITION, str(error)) from error
        self.name = said.name
        return said.name

    async def serve(self, stopping: asyncio.Event) -> None:
        """Answer what the client asks, until it has nothing more to ask; raises `Ended`."""
        await self._write(Welcome())
        try:
            while (said := await self._hear(None)) is not None:
                reason = self._take(said, stopping.is_set())
                if reason is not None:
                    self._host.counters.not_answered(reason)
                    # Not as a task: who does not take refusals is not heard further.
                    await self._write(Refusal(cast(Request | Upstream, said).number, reason))
            while self._answering:  # the client has no more questions, but still listens
                await asyncio.wait(self._answering)
        finally:
            for task in self._answering:
                task.cancel()
            self._host.batcher.left(self._id)

    def _take(self, said: FromClient, stopping: bool) -> Reason | None:
        """Begin to answer; or why not."""
        try:
            if isinstance(said, Request):
                return self._request(said, stopping)
            if isinstance(said, Upstream):
                return self._upstream(said)
            raise MalformedMessage("a second introduction")
        except MalformedMessage as error:
            raise Ended(Code.INVALID_ARGUMENT, str(error)) from error

    def _request(self, request: Request, stopping: bool) -> Reason | None:
        host, terms = self._host, self._host.description.terms
        if request.number != self._last + 1:
            raise MalformedMessage(f"request {request.number} follows request {self._last}")
        self._last = request.number
        if stopping:
            return Reason.STOPPING
        if self.pending >= host.limits.requests:
            return Reason.BUSY
        tokens = int(request.lengths.sum())
        if not host.batcher.has_room(tokens * terms.width * 4):  # float32
            return Reason.BUSY
        values = decode(request.embeddings, tokens, terms.width, host.encoding)
        work = Work(request.kind, values, request.lengths, request.labels)
        try:
            result = host.batcher.submit(self._id, request.number, work, request.patience / 1000)
        except NotAnswered as refused:
            return refused.reason
        up = len(request.embeddings) + LABEL_BYTES * len(request.labels)
        self._begin(request.number, result, _Passed(request.kind, request.lengths, up))
        return None

    def _upstream(self, upstream: Upstream) -> Reason | None:
        passed = self._opened.pop(upstream.number, None)
        if passed is None:
            return Reason.FORGOTTEN
        values = self._host.description.terms.output_values
        gradient = self._host.outputs.decode(upstream.gradient, len(passed.lengths), values)
        try:
            result = self._host.batcher.pull_back(self._id, upstream.number, gradient)
        except NotAnswered as refused:
            return refused.reason
        up = passed.up + len(upstream.gradient)
        again = _Passed(Kind.DIFFERENTIATE, passed.lengths, up, passed.down)
        self._begin(upstream.number, result, again)
        return None

    def _begin(self, number: int, result: Future[Result], passed: _Passed) -> None:
        task = asyncio.create_task(self._answer(number, result, passed))
        self._answering.add(task)
        task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._answering.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Ended):
            if not self._ending.done():
                self._ending.set_result(error)
        elif error is not None and not self._context.done():
            logger.error("an answer was not sent", exc_info=error)
            self.end(Code.INTERNAL, "the server of the base model failed; see its log")

    async def _answer(self, number: int, result: Future[Result], passed: _Passed) -> None:
        try:
            found = await asyncio.wrap_future(result)
        except NotAnswered as refused:
            self._host.counters.not_answered(refused.reason)
            await self._write(Refusal(number, refused.reason))
            return
        answer = self._encoded(number, found, passed.kind)
        down = passed.down + len(answer.values) + len(answer.gradient)
        passed = _Passed(passed.kind, passed.lengths, passed.up, down)
        if passed.kind == Kind.OPEN:
            self._opened[number] = passed
            while len(self._opened) > self._host.limits.requests:  # those that never came
                del self._opened[min(self._opened)]
        await self._write(answer)
        if passed.kind != Kind.OPEN:
            self._host.counters.passed(self.name, _traffic(passed))

    def _encoded(self, number: int, found: Result, kind: Kind) -> Answer:
        values, gradient = b"", b""
        if found.values is not None and kind == Kind.DIFFERENTIATE:
            values = encode(found.values, "float32")
        elif found.values is not None:
            values = self._host.outputs.encode(found.values)
        if found.gradient is not None:
            gradient = encode(found.gradient, self._host.encoding)
        return Answer(number, values, gradient)

    async def _hear(self, seconds: float | None) -> FromClient | None:
        """What the client says next, within so many seconds; None if it has nothing more to say."""
        read = asyncio.ensure_future(self._context.read())
        try:
            first: set[asyncio.Future[Any]] = {read, self._ending}
            await asyncio.wait(first, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if self._ending.done():
                raise self._ending.result()
            if not read.done():
                raise Ended(Code.DEADLINE_EXCEEDED, "nothing was heard for too long")
            payload: Any = read.result()
        finally:
            read.cancel()
        if payload is EOF:
            return None
        try:
            return decode_from_client(payload, self._host.description)
        except MalformedMessage as error:
            raise Ended(Code.INVALID_ARGUMENT, str(error)) from error

    async def _write(self, said: FromServer) -> None:
        async with self._writing:
            if self._stalled:  # gRPC writes one after another, and the last has not gone out
                raise Ended(Code.DEADLINE_EXCEEDED, "the client does not take its answers")
            try:
                async with asyncio.timeout(self._host.limits.write):
                    await self._context.write(encode_from_server(said))
            except TimeoutError as error:
                self._stalled = True
                words = "the client does not take its answers"
                raise Ended(Code.DEADLINE_EXCEEDED, words) from error


def _traffic(passed: _Passed) -> CutTraffic:
    if passed.kind == Kind.OUTPUTS:
        return CutTraffic(evaluated=len(passed.lengths), evaluation_bytes=passed.up + passed.down)
    tokens = int(passed.lengths.sum())
    return CutTraffic(len(passed.lengths), tokens, passed.up, passed.down)
