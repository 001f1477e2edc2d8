"""One connection of a client to the server of its base model; every wait on it has a limit."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

import grpc

from fedtune.errors import BaseRefused, ConfigError, KeyFileError, MalformedMessage
from fedtune.secagg.keys import Identity, Roster
from fedtune.split.address import SERVICE, is_loopback
from fedtune.split.introduction import introduce
from fedtune.tls import tls_context
from fedtune.wire.split import (
    Answer,
    Challenge,
    Description,
    FromClient,
    FromServer,
    Refusal,
    Terms,
    Welcome,
    decode_description,
    decode_from_server,
    encode_describe_request,
    encode_from_client,
)

LARGEST_ANSWER = 64 << 20  # bytes
LONGEST_WORDS = 300
# Ends of a call after which trying again does not help.
_FINAL = {
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
}
_DIFFERENT = {
    "federation": "another configuration; install the same federation.toml on both sides",
    "base": "another base model; base.digest in federation.toml says which it must be",
    "answers": "other answers, or another tokenizer; compare data.labels and base.digest",
    "width": "embeddings of another width; compare base.digest and base.connector-digest",
    "answer_count": "another number of answers; compare data.labels",
    "encoding": "another encoding of embeddings; compare split.activations",
    "rungs": "outputs of another kind; compare adapter.kind, output-rank and rungs",
}


class Broken(Exception):
    """A connection that is of no use any more; another one may be."""


class Connection:
    """Not for several threads."""

    def __init__(
        self,
        address: str,
        authority: bytes | None,
        identity: Identity,
        roster: Roster,
        terms: Terms,
        seconds: float,
    ) -> None:
        """Connect, compare and introduce, each step within `seconds`.

        Raises `Broken`, or `BaseRefused` if trying again would not help.
        """
        self._address, self._terms = address, terms
        # A channel of its own each time: none that waits longer and longer until it connects.
        self._channel = _channel(address, authority)
        self._sent: SimpleQueue[bytes | None] = SimpleQueue()
        self._call: Any = None
        try:
            self.description = self._described(seconds, authority)
            exchange: Any = self._channel.stream_stream(f"/{SERVICE}/Exchange")
            self._call = exchange(iter(self._sent.get, None))
            challenge = self._hear(seconds)
            if not isinstance(challenge, Challenge):
                raise self._strange("no challenge came first")
            self._sent.put(encode_from_client(introduce(identity, roster, terms, challenge)))
            if not isinstance(self._hear(seconds), Welcome):
                raise self._strange("no welcome follows an introduction")
        except BaseException:
            self.close()
            raise

    def ask(self, said: FromClient, seconds: float) -> Answer | Refusal:
        """What the server answers within `seconds`; raises `Broken` or `BaseRefused`."""
        payload = encode_from_client(said)
        if len(payload) > self.description.message_bytes:
            raise BaseRefused(
                f"{self._address}: a request of {len(payload)} bytes is more than the "
                f"{self.description.message_bytes} that the server takes; lower train.batch-size"
            )
        self._sent.put(payload)
        found = self._hear(seconds)
        if not isinstance(found, Answer | Refusal):
            raise self._strange("it does not answer")
        return found

    def close(self) -> None:
        """End it."""
        self._sent.put(None)
        if self._call is not None:
            self._call.cancel()
        self._channel.close()

    def _described(self, seconds: float, authority: bytes | None) -> Description:
        describe: Any = self._channel.unary_unary(f"/{SERVICE}/Describe")
        try:
            found = decode_description(describe(encode_describe_request(), timeout=seconds))
        except grpc.RpcError as error:
            if authority is not None:
                _check_certificate(self._address, authority, seconds)
            raise self._translated(error) from error
        except MalformedMessage as error:
            raise self._strange(str(error)) from error
        for name, words in _DIFFERENT.items():
            theirs, ours = getattr(found.terms, name), getattr(self._terms, name)
            if theirs != ours:
                raise BaseRefused(
                    f"{self._address}: the server has {words} "
                    f"({str(theirs)[:12]} there, {str(ours)[:12]} here)"
                )
        return found

    def _hear(self, seconds: float) -> FromServer:
        try:
            with self._within(seconds):
                payload = next(self._call)
            return decode_from_server(payload, LARGEST_ANSWER)
        except StopIteration as error:
            raise Broken("the server ended the connection") from error
        except grpc.RpcError as error:
            raise self._translated(error) from error
        except MalformedMessage as error:
            raise self._strange(str(error)) from error

    @contextmanager
    def _within(self, seconds: float) -> Iterator[None]:
        """End the call after so many seconds: a wait for a stream has no limit of its own."""
        timer = threading.Timer(seconds, self._call.cancel)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _translated(self, error: Any) -> Exception:
        code = error.code()
        words = "".join(c for c in (error.details() or "") if c.isprintable())[:LONGEST_WORDS]
        if code == grpc.StatusCode.UNIMPLEMENTED:
            return BaseRefused(f"{self._address}: there is no server of a base model there")
        if code in _FINAL:
            return BaseRefused(f"{self._address}: {words}")
        if code == grpc.StatusCode.CANCELLED:
            words = "no answer came in time"
        return Broken(words)

    def _strange(self, what: str) -> BaseRefused:
        return BaseRefused(
            f"{self._address}: the server says something unexpected ({what}); install the same "
            "fedtune on both sides"
        )


def _channel(address: str, authority: bytes | None) -> grpc.Channel:
    options: list[tuple[str, int]] = [
        ("grpc.max_receive_message_length", LARGEST_ANSWER),
        ("grpc.max_send_message_length", -1),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.per_message_decompression", 0),
        # So that a server is missed whose machine has gone without a word.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),  # any number: an answer may take minutes
    ]
    if authority is None:
        return grpc.insecure_channel(address, [*options, ("grpc.enable_http_proxy", 0)])
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authority), options)


def check_address(address: str, authority: bytes | None) -> None:
    """Raise `ConfigError` or `KeyFileError` for what can never be connected to."""
    parts = urlsplit(f"//{address}")
    try:
        if not parts.hostname or not parts.port:
            raise ValueError
    except ValueError as error:
        raise ConfigError(f"{address!r} is not an address; say HOST:PORT") from error
    if authority is None and not is_loopback(parts.hostname):
        raise ConfigError(
            f"the base model at {address} would be reached without TLS; only a loopback address "
            "may be"
        )
    if authority is not None:
        try:
            tls_context(authority)
        except (ssl.SSLError, ValueError) as error:
            raise KeyFileError("the authority of the server is no certificate in PEM") from error


def _check_certificate(address: str, authority: bytes, seconds: float) -> None:
    """Raise `BaseRefused` if it is the server's certificate that is not accepted.

    gRPC says this only in words that may change.
    """
    parts = urlsplit(f"//{address}")
    context = tls_context(authority)
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((parts.hostname, parts.port), seconds) as plain,
            context.wrap_socket(plain, server_hostname=parts.hostname),
        ):
            return
    except ssl.SSLCertVerificationError as error:
        raise BaseRefused(
            f"{address}: the certificate of the server of the base model is not accepted "
            f"({error.verify_message}); it needs the ca.crt of this federation's server, and an "
            "address that its certificate names"
        ) from error
    except OSError:
        return  # whatever it is, it is not the certificate
