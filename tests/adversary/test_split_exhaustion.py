"""Memory, connections and time that a base model's server gives to who wants all of it."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import grpc
import pytest
from split_raw import Ended, a_request, member, raw_client
from split_service import (
    HOST,
    LONG,
    Parties,
    ServerProcess,
    serving,
    wait_for,
)

from fedtune.base.answering import AnsweringDecoder
from fedtune.config import Limits
from fedtune.split.address import SERVICE
from fedtune.split.service import MOST_STREAMS
from fedtune.wire.split import Answer, Kind, Terms

MESSAGE = 1 << 20
LIMITS = Limits(message_bytes=MESSAGE, handshake=1.0, write=0.5)
# What a server may grow by, whatever is sent to it: buffers of a few connections.
GROWTH = 64 << 20


@pytest.fixture(scope="module")
def parties() -> Parties:
    return Parties.make("malicious", "honest")


@pytest.fixture(scope="module")
def process(
    tiny_decoder: Path, parties: Parties, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """Without TLS, so that bytes can be written by hand."""
    folder = tmp_path_factory.mktemp("server")
    found = ServerProcess(folder, tiny_decoder, parties.roster, limits=LIMITS).start()
    yield found
    found.stop()


@pytest.fixture
def watched(process: ServerProcess, parties: Parties, terms: Terms) -> Iterator[ServerProcess]:
    """The server; afterwards it has not grown, and answers."""
    _ask(process.port, parties, terms)
    before = process.peak_memory
    yield process
    _ask(process.port, parties, terms)
    assert process.peak_memory < before + GROWTH


def _ask(port: int, parties: Parties, terms: Terms) -> None:
    with member(port, parties, "honest", terms) as raw:
        raw.say(a_request(terms, 1, Kind.DIFFERENTIATE, count=60))
        assert isinstance(raw.hear(), Answer)


@pytest.mark.parametrize("let_in", [False, True])
def test_a_message_over_the_limit_is_not_read(
    watched: ServerProcess, parties: Parties, terms: Terms, let_in: bool
) -> None:
    with raw_client(watched.port) as raw:
        if let_in:
            raw.introduced(parties.identities["malicious"], parties.roster, terms)
        else:
            raw.open()
        raw.say(bytes((200 if let_in else 2) << 20))  # a stranger has no time for more
        assert raw.end().code == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_message_at_the_limit_is_read_and_refused(
    watched: ServerProcess, parties: Parties, terms: Terms
) -> None:
    with member(watched.port, parties, "malicious", terms) as raw:
        raw.say(bytes(MESSAGE))
        assert raw.end().code == grpc.StatusCode.INVALID_ARGUMENT


def test_what_would_grow_when_it_is_unpacked_is_not_unpacked(
    watched: ServerProcess, parties: Parties, terms: Terms
) -> None:
    with raw_client(watched.port) as raw:
        raw.say(bytes(500 << 20))  # half a megabyte
        with pytest.raises(Ended) as found:
            raw.open(compression=grpc.Compression.Gzip)
        assert found.value.code == grpc.StatusCode.UNIMPLEMENTED


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame of HTTP/2 (RFC 9113, section 4.1)."""
    return (
        len(payload).to_bytes(3, "big")
        + bytes([kind, flags])
        + stream.to_bytes(4, "big")
        + (payload)
    )


def _literal(name: str, value: str) -> bytes:
    """A header field that no table is needed for (RFC 7541, section 6.2.2)."""
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def _hand_made(port: int, settings: bytes = b"") -> socket.socket:
    """A stream of `Exchange`, by hand."""
    headers = b"".join(
        _literal(name, value)
        for name, value in (
            (":method", "POST"),
            (":scheme", "http"),
            (":path", f"/{SERVICE}/Exchange"),
            (":authority", HOST),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        )
    )
    door = socket.create_connection((HOST, port), LONG)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    door.sendall(preface + _frame(4, 0, 0, settings) + _frame(1, 4, 1, headers))
    return door


def _read_to_end(door: socket.socket, what: bytes) -> None:
    """Read until `what` has come or nothing more comes."""
    found, deadline = b"", time.monotonic() + LONG
    while what not in found:
        assert time.monotonic() < deadline
        piece = door.recv(1 << 16)
        if not piece:
            return
        found += piece


def test_a_length_of_four_gigabytes_is_refused_before_it_comes(watched: ServerProcess) -> None:
    with closing(_hand_made(watched.port)) as door:
        door.sendall(_frame(0, 0, 1, b"\0\xff\xff\xff\xff"))
        _read_to_end(door, b"larger than max")


@pytest.mark.parametrize("flags", [b"\1", b"\2", b"\xff"])
def test_flags_of_a_message_that_are_not_known(watched: ServerProcess, flags: bytes) -> None:
    with closing(_hand_made(watched.port)) as door:
        door.sendall(_frame(0, 0, 1, flags + b"\0\0\0\3abc"))
        _read_to_end(door, b"grpc-status")


def test_who_says_a_message_byte_by_byte_is_cut_off(watched: ServerProcess) -> None:
    with closing(_hand_made(watched.port)) as door:
        door.sendall(_frame(0, 0, 1, b"\0\0\0\4\0"))
        door.settimeout(0.05)
        found, deadline = b"", time.monotonic() + LONG
        while b"too long" not in found:
            assert time.monotonic() < deadline
            door.sendall(_frame(0, 0, 1, b"x"))
            try:
                found += door.recv(1 << 16)
            except TimeoutError:
                continue


def test_who_has_no_window_for_a_challenge_is_let_go(
    decoder: AnsweringDecoder, parties: Parties, terms: Terms, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    no_window = b"\0\4" + bytes(4)  # SETTINGS_INITIAL_WINDOW_SIZE
    with (
        serving(decoder, parties.roster, limits=LIMITS) as server,
        closing(_hand_made(server.port, no_window)),
    ):
        wait_for(lambda: "does not take its answers" in caplog.text)
        _ask(server.port, parties, terms)


@pytest.mark.parametrize("tls", [False, True])
def test_who_connects_and_says_nothing_is_cut_off(
    decoder: AnsweringDecoder, parties: Parties, terms: Terms, split_keys: Path, tls: bool
) -> None:
    keys = split_keys if tls else None
    authority = (split_keys / "ca.crt").read_bytes()
    with serving(decoder, parties.roster, keys=keys, limits=LIMITS) as server:
        silent = [socket.create_connection((HOST, server.port), LONG) for _ in range(50)]
        if tls:  # half a greeting
            memory = ssl.MemoryBIO(), ssl.MemoryBIO()
            context = ssl.create_default_context(cadata=authority.decode())
            tunnel = context.wrap_bio(*memory, server_hostname=HOST)
            with pytest.raises(ssl.SSLWantReadError):
                tunnel.do_handshake()
            greeting = memory[1].read()
            for door in silent[:25]:
                door.sendall(greeting[: len(greeting) // 2])
        with member(
            server.port, parties, "honest", terms, **({"authority": authority} if tls else {})
        ) as raw:
            raw.say(a_request(terms))
            assert isinstance(raw.hear(), Answer)
        for door in silent:
            with closing(door):
                _read_to_end(door, b"nothing that comes")


def test_who_takes_no_answers_is_let_go_and_does_not_get_more_streams(
    decoder: AnsweringDecoder, parties: Parties, terms: Terms, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    identity = parties.identities["malicious"]
    words = "malicious: the client does not take its answers"
    small_window = {"http2.bdp_probe": 0, "http2.lookahead_bytes": 1024}
    with serving(decoder, parties.roster, limits=LIMITS) as server, ExitStack() as greedy:
        for place in range(1, MOST_STREAMS + 1):
            raw = greedy.enter_context(raw_client(server.port, **small_window))
            raw.introduced(identity, parties.roster, terms)
            for number in range(1, 300):
                raw.say(a_request(terms, number, Kind.DIFFERENTIATE, count=60))
            wait_for(lambda expected=place: caplog.text.count(words) == expected)
        with raw_client(server.port) as one_more, pytest.raises(Ended) as found:
            one_more.introduced(identity, parties.roster, terms)
        assert found.value.code == grpc.StatusCode.UNAVAILABLE
        _ask(server.port, parties, terms)
        greedy.close()
        # As soon as they are gone it may come again.
        wait_for(lambda: _is_let_in(server.port, parties, terms))


def _is_let_in(port: int, parties: Parties, terms: Terms) -> bool:
    with raw_client(port) as raw:
        try:
            raw.introduced(parties.identities["malicious"], parties.roster, terms)
        except Ended:
            return False
        return True


def test_one_connection_has_few_streams(
    decoder: AnsweringDecoder, parties: Parties, terms: Terms
) -> None:
    with serving(decoder, parties.roster) as server, raw_client(server.port) as raw:
        calls = []
        for _ in range(20):
            exchange = raw.channel.stream_stream(f"/{SERVICE}/Exchange")
            calls.append(exchange(iter([]), timeout=2.0))
        ends = [_status(call) for call in calls]
        # Those beyond wait for their turn at the client's side.
        assert ends.count(grpc.StatusCode.INVALID_ARGUMENT) >= 8
        _ask(server.port, parties, terms)


def _status(call: object) -> grpc.StatusCode:
    try:
        for _ in call:  # type: ignore[attr-defined]
            pass
    except grpc.RpcError as error:
        found: grpc.StatusCode = error.code()
        return found
    return grpc.StatusCode.OK
