"""The calls of the service: what it works on, and one stream for each client."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from functools import partial
from typing import Any

import grpc
from grpc import aio

from fedtune.errors import MalformedMessage
from fedtune.split.address import SERVICE
from fedtune.split.session import Code, Context, Ended, Host, Session
from fedtune.wire.split import check_describe_request, encode_description

logger = logging.getLogger(__name__)
MOST_STREAMS = 3  # of one client: a client that comes back may be there before it has gone
DRAIN_POLL = 0.02


class Service:
    """The two calls, on the server's event loop."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._description = encode_description(host.description)
        self._stopping = asyncio.Event()
        self._strangers: list[Session] = []
        self._sessions: dict[str, Session] = {}
        self._streams: Counter[str] = Counter()  # with those that are over, but for gRPC

    def handlers(self) -> grpc.GenericRpcHandler:
        """For `aio.Server`. Messages are bytes: `fedtune.wire` reads them, within bounds."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Describe": grpc.unary_unary_rpc_method_handler(self._describe),
                "Exchange": grpc.stream_stream_rpc_method_handler(self._exchange),
            },
        )

    async def drain(self, grace: float) -> None:
        """Refuse what is new, wait for what is not, and end the streams."""
        self._stopping.set()
        deadline = asyncio.get_running_loop().time() + grace
        while any(session.pending for session in self._sessions.values()):
            if asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(DRAIN_POLL)
        for session in [*self._strangers, *self._sessions.values()]:
            session.end(Code.UNAVAILABLE, "the server of the base model stops")

    async def _describe(self, payload: bytes, context: Context) -> bytes:
        try:
            check_describe_request(payload)
        except MalformedMessage as error:
            await context.abort(Code.FAILED_PRECONDITION, str(error))
        return self._description

    async def _exchange(self, _requests: Any, context: Context) -> None:
        session = Session(self._host, context)
        try:
            await self._hosted(session, context)
        except Ended as ended:
            logger.info("%s: %s", session.name or "a client that is not known", ended.words)
            try:
                # The last thing to do: it lasts for as long as the client takes nothing.
                await context.abort(ended.code, ended.words)
            except aio.AbortError:
                raise
            except Exception as error:  # the client went before it heard; gRPC's is not public
                raise asyncio.CancelledError from error

    async def _hosted(self, session: Session, context: Context) -> None:
        self._strangers.append(session)
        if len(self._strangers) > self._host.limits.strangers:
            # The one that has been silent for longest; who knows the key needs no time.
            self._strangers[0].end(Code.UNAVAILABLE, "too many connections; try again")
        try:
            name = await session.introduced()
        finally:
            self._strangers.remove(session)
        if self._streams[name] >= MOST_STREAMS:
            raise Ended(Code.UNAVAILABLE, "earlier connections of this client are not over")
        self._streams[name] += 1
        over: Any = partial(self._over, name)  # the stubs want a class of their own
        context.add_done_callback(over)
        if (last := self._sessions.get(name)) is not None:
            # Most likely what is left of a connection that broke.
            last.end(Code.ABORTED, f"another process has introduced itself as {name!r}")
        self._sessions[name] = session
        logger.info("%s is there", name)
        try:
            await session.serve(self._stopping)
        finally:
            if self._sessions.get(name) is session:
                del self._sessions[name]
            logger.info("%s has left", name)

    def _over(self, name: str, _context: object) -> None:
        self._streams[name] -= 1
        if not self._streams[name]:
            del self._streams[name]
