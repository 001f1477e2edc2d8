"""The way to a server, where each thing that can be wrong is wrong: sockets, TLS, a clock."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from doctor_helpers import only, statuses

from fedtune.deploy import keys
from fedtune.deploy.doctor import network
from fedtune.deploy.doctor.findings import Examination

Serve = Callable[..., tuple[str, bytes]]


class _Handler(BaseHTTPRequestHandler):
    """Has no page, and a clock that is ahead by `ahead` seconds; None: it does not say."""

    ahead: float | None = 0.0

    def do_GET(self) -> None:
        self.send_response_only(404)
        if self.ahead is not None:
            self.send_header("date", self.date_time_string(time.time() + self.ahead))
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts a server with keys of its own; its address, and the authority's certificate."""
    with ExitStack() as stack:

        def start(
            hosts: tuple[str, ...] = ("127.0.0.1",),
            days: float = 397,
            ahead: float | None = 0.0,
            newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
        ) -> tuple[str, bytes]:
            folder = tmp_path / f"server-{days}-{ahead}-{'-'.join(hosts)}"
            with monkeypatch.context() as patch:
                patch.setattr(keys, "SERVER_DAYS", days)
                keys.make_server_keys(folder, hosts)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.maximum_version = newest
            context.load_cert_chain(folder / keys.SERVER_CERTIFICATE, folder / keys.SERVER_KEY)
            handler = type("Handler", (_Handler,), {"ahead": ahead})
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
            server.daemon_threads = True
            server.handle_error = lambda *_: None  # type: ignore[method-assign]  # we hang up
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            authority = (folder / keys.AUTHORITY).read_bytes()
            return f"127.0.0.1:{server.server_port}", authority

        yield start


def examined(server: str, authority: bytes | None) -> Examination:
    """Without a transport key: whether a site is let in is asked of the real server elsewhere."""
    examination = Examination()
    network.examine_network(examination, server, authority, None)
    return examination


def test_a_server_that_is_in_order(serve: Serve) -> None:
    found = examined(*serve())
    assert statuses(found) == {
        "address": "ok",
        "port": "ok",
        "certificate": "ok",
        "clock": "ok",
        "admission": "skipped",
    }
    assert only(found, "certificate").numbers["days_left"] == pytest.approx(397, abs=0.1)
    assert abs(only(found, "clock").numbers["offset_seconds"]) < 2


@pytest.mark.parametrize("minutes", [-10, 10])
def test_a_clock_that_is_wrong(serve: Serve, minutes: int) -> None:
    found = only(examined(*serve(ahead=minutes * 60)), "clock")
    assert found.status == "warning"
    assert found.numbers["offset_seconds"] == pytest.approx(minutes * 60, abs=2)


def test_a_server_that_does_not_say_what_time_it_is(serve: Serve) -> None:
    found = examined(*serve(ahead=None))
    assert statuses(found)["certificate"] == "ok"
    assert only(found, "clock").status == "skipped"


def test_a_certificate_that_ends_soon(serve: Serve) -> None:
    found = only(examined(*serve(days=20)), "certificate")
    assert found.status == "warning"
    assert "in 20 days" in found.finding


def test_what_can_be_wrong_with_a_certificate(serve: Serve) -> None:
    address, authority = serve()
    other = serve(days=396)[1]
    for server, certificate, words in (
        (*serve(days=-0.02), "the server's certificate has expired"),
        (address, other, "signed by another authority"),
        (*serve(("elsewhere.example",)), "is not for 127.0.0.1"),
        (address.replace("127.0.0.1", "localhost"), authority, "is not for localhost"),
        (address, b"-----BEGIN", "is not a certificate in PEM form"),
        (*serve(days=395, newest=ssl.TLSVersion.TLSv1_2), "does not speak HTTP over TLS 1.3"),
    ):
        found = examined(server, certificate)
        assert only(found, "port").status == "ok"
        assert only(found, "certificate").status == "problem"
        assert words in only(found, "certificate").finding
        assert only(found, "certificate").advice
        assert statuses(found)["clock"] == statuses(found)["admission"] == "skipped"


def test_a_port_where_nobody_listens() -> None:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))  # and does not listen
        found = examined(f"127.0.0.1:{door.getsockname()[1]}", b"")
    assert only(found, "port").status == "problem"
    assert "refuses" in only(found, "port").finding
    assert list(statuses(found).values()) == ["ok", "problem", "skipped", "skipped", "skipped"]


def test_a_port_that_accepts_and_says_nothing(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = serve()[1]
    monkeypatch.setattr(network, "TIMEOUT", 0.3)
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        door.listen()
        started = time.monotonic()
        found = examined(f"127.0.0.1:{door.getsockname()[1]}", authority)
    assert time.monotonic() - started < 3
    assert only(found, "certificate").status == "problem"
    assert "says nothing" in only(found, "certificate").finding


def test_a_server_that_dribbles_does_not_hold_us_up(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then: no timeout of a socket ever strikes."""
    authority = serve()[1]
    monkeypatch.setattr(network, "TIMEOUT", 0.3)
    ended = threading.Event()

    def dribble(door: socket.socket) -> None:
        connections = [door.accept()[0] for _ in range(2)]  # the second is for the handshake
        # The head of a TLS record of 16,000 bytes, and then its bytes one by one.
        connections[1].sendall(bytes([22, 3, 3, 0x3E, 0x80]))
        while not ended.wait(0.1):
            connections[1].sendall(b"\x02")

    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        door.listen()
        thread = threading.Thread(target=dribble, args=(door,))
        thread.start()
        started = time.monotonic()
        found = examined(f"127.0.0.1:{door.getsockname()[1]}", authority)
        assert time.monotonic() - started < 3
        ended.set()
        thread.join()
    assert only(found, "certificate").status == "problem"


def test_a_port_that_drops_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody takes connections out of a queue that is full: the kernel answers no more."""
    monkeypatch.setattr(network, "TIMEOUT", 0.3)
    with ExitStack() as stack:
        door = stack.enter_context(socket.socket())
        door.bind(("127.0.0.1", 0))
        door.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(door.getsockname())
        found = examined(f"127.0.0.1:{door.getsockname()[1]}", b"")
    assert only(found, "port").status == "problem"
    assert "does not answer within" in only(found, "port").finding


@pytest.mark.parametrize("host", ["no-such-host.invalid", f"{'a' * 70}.example"])
def test_a_name_that_nobody_knows(host: str) -> None:
    found = examined(f"{host}:9092", b"")
    assert only(found, "address").status == "problem"
    assert host in only(found, "address").finding
    assert set(statuses(found).values()) == {"problem", "skipped"}


@pytest.mark.parametrize("server", ["host:port", ":9092", "[::1:9092", "host:99999"])
def test_an_address_that_is_none(server: str) -> None:
    found = only(examined(server, b""), "address")
    assert found.status == "problem"
    assert "HOST:PORT" in found.advice


def test_a_proxy_is_told_without_its_password(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@proxy.example:3128")
    found = examined(*serve())
    assert only(found, "proxy").status == "warning"
    assert "secret" not in str(found.to_json())
