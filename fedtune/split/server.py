"""The service itself: a base model behind a port, for clients of a roster."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

import grpc
from grpc import aio

from fedtune.base.answering import AnsweringDecoder
from fedtune.config import Limits
from fedtune.errors import ConfigError
from fedtune.secagg.keys import Roster
from fedtune.split.address import is_loopback
from fedtune.split.batcher import Batcher
from fedtune.split.counters import Counters, SplitStatus
from fedtune.split.service import Service
from fedtune.split.session import Host
from fedtune.train.activations import Encoding
from fedtune.wire.split import Description, Terms

logger = logging.getLogger(__name__)
START_SECONDS = 30.0
END_SECONDS = 1.0


@dataclass(frozen=True)
class Tls:
    """The server's certificate and its private key, as PEM."""

    certificate: bytes
    key: bytes = field(repr=False)


def terms_of(decoder: AnsweringDecoder, federation: str, encoding: Encoding) -> Terms:
    """What a server with this decoder works on; `federation` is `Config.digest`."""
    base = decoder.base.digest
    return Terms.of(federation, base, decoder.tokens, decoder.width, encoding, decoder.rungs)


class SplitServer:
    """Hosts `decoder` for the clients of `roster` until it is stopped."""

    def __init__(
        self,
        decoder: AnsweringDecoder,
        terms: Terms,
        roster: Roster,
        host: str,
        port: int,
        tls: Tls | None,
        limits: Limits = Limits(),  # noqa: B008  # frozen
    ) -> None:
        """`port` 0 takes a free one. `tls` None is for this machine alone.

        Raises `ConfigError` without `tls` on an address that others can reach.
        """
        if tls is None and not is_loopback(host):
            raise ConfigError(
                f"the base model would be served at {host} without TLS; only a loopback address "
                "may be"
            )
        longest = min(limits.tokens, decoder.base.max_tokens)
        description = Description(terms, limits.examples, longest, limits.message_bytes)
        self._counters = Counters()
        self._decoder, self._roster, self._limits = decoder, roster, limits
        self.description, self._address, self._tls = description, f"{host}:{port}", tls
        self._thread = threading.Thread(target=self._run, name="split-server", daemon=True)
        self._bound: Future[int] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._grace: asyncio.Future[float] | None = None
        self.port = port

    def start(self) -> Self:
        """Listen; raises `ConfigError` if that cannot be."""
        self._thread.start()
        self.port = self._bound.result(START_SECONDS)
        return self

    def stop(self, grace: float = 5.0) -> None:
        """Take no more requests, answer what waits within `grace` seconds, and end."""
        if self._loop is not None and self._grace is not None and self._thread.is_alive():
            with suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(_set, self._grace, grace)
            self._thread.join()

    @property
    def status(self) -> SplitStatus:
        """What was done since the start."""
        return self._counters.status

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:
            if self._bound.done():
                logger.exception("the server of the base model has failed")
            else:
                self._bound.set_exception(error)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._grace = self._loop.create_future()
        batcher = Batcher(self._decoder, self._limits, self._counters)
        try:
            host = Host(self.description, self._roster, self._limits, batcher, self._counters)
            service = Service(host)
            server = aio.server(options=_options(self._limits))
            server.add_generic_rpc_handlers((service.handlers(),))
            port = _bind(server, self._address, self._tls)
            await server.start()
            self._bound.set_result(port)
            await service.drain(await self._grace)
            await server.stop(END_SECONDS)
        finally:
            await asyncio.to_thread(batcher.close)


def _bind(server: aio.Server, address: str, tls: Tls | None) -> int:
    try:
        if tls is None:
            return server.add_insecure_port(address)
        credentials = grpc.ssl_server_credentials([(tls.key, tls.certificate)])
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ConfigError(
            f"cannot serve the base model at {address}: the port is taken, or the certificate "
            "does not fit its key"
        ) from error


def _options(limits: Limits) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", limits.message_bytes),
        ("grpc.so_reuseport", 0),  # else two servers could have one port, unnoticed
        # A few bytes could become gigabytes before anybody looks at their length.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.per_message_decompression", 0),
        ("grpc.max_concurrent_streams", 8),  # of one connection
        ("grpc.server_handshake_timeout_ms", int(limits.handshake * 1000)),
        ("grpc.max_connection_idle_ms", 60_000),  # without any stream
        # So that a client is missed whose machine has gone without a word.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]


def _set(future: asyncio.Future[float], value: float) -> None:
    if not future.done():
        future.set_result(value)
