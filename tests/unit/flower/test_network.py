"""What is assumed of Flower's network, against the real thing: its SuperLink, sockets, TLS."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import resource
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import Message, RecordDict

from fedtune.config import ClientConfig, Config
from fedtune.deploy import superlink
from fedtune.deploy.client import _Site
from fedtune.deploy.keys import (
    AUTHORITY,
    SERVER_CERTIFICATE,
    SERVER_KEY,
    make_roster,
    make_server_keys,
    make_site_keys,
    read_site_keys,
)
from fedtune.deploy.participation import Participation
from fedtune.deploy.site_files import SiteFiles
from fedtune.deploy.superlink import Doors, SuperLinkProcess
from fedtune.errors import (
    ConfigError,
    ProtocolViolation,
    ServerRefused,
    ServerUnreachable,
    TrainingError,
)
from fedtune.flower import fleet_grid, internals
from fedtune.flower.envelope import FAREWELL, reply, unwrap, wrap
from fedtune.flower.fleet_grid import FleetGrid
from fedtune.flower.network import NodeConnection
from fedtune.flower.runtime import RunTicket

_FORK = multiprocessing.get_context("fork")
DEADLINE = 90.0
LARGEST = 20_000_000  # bytes of a message


class Network:
    """A SuperLink that two sites, `a` and `b`, may connect to, and `c` not."""

    def __init__(self, folder: Path, on_disk: bool = False) -> None:
        self.folder, self._on_disk = folder, on_disk
        make_server_keys(folder / "server", ["127.0.0.1"])
        public = [make_site_keys(folder / name, name) for name in ("a", "b", "c")]
        members = make_roster(folder / "roster.toml", folder / "server", public[:2])
        self.link = SuperLinkProcess(self.doors(0), members.transport)
        self.grid = FleetGrid(self.link.address, self.link.ticket, LARGEST)
        self._sites: list[Any] = []

    def doors(self, port: int) -> Doors:
        """On disk or in memory: the tests are divided between the two."""
        keys = self.folder / "server"
        return Doors(
            "127.0.0.1",
            port,
            keys / SERVER_CERTIFICATE,
            keys / SERVER_KEY,
            self.folder / "superlink.db" if self._on_disk else None,
            self.folder / "superlink.log",
        )

    def connection(
        self,
        name: str,
        largest: int = LARGEST,
        port: int = 0,
        kind: type[NodeConnection] = NodeConnection,
    ) -> NodeConnection:
        authority = (self.folder / "server" / AUTHORITY).read_bytes()
        transport = read_site_keys(self.folder / name, name).transport
        return kind(f"127.0.0.1:{port or self.link.port}", authority, transport, largest)

    def site(self, name: str, change: Callable[[bytes], bytes], silent: int = 0) -> Any:
        """A process that answers with the changed payload, to all but the first `silent`."""

        def work() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            connection = self.connection(name)
            connection.activate()
            quiet = silent
            while True:
                message = connection.pull()
                if message is None:
                    time.sleep(0.01)
                elif quiet:
                    quiet -= 1
                else:
                    connection.push(reply(message, change(unwrap(message))), 0.0)

        process = _FORK.Process(target=work, daemon=True)
        process.start()
        self._sites.append(process)
        self.wait(lambda: len(self.grid.activations()) == self.alive())
        return process

    def alive(self) -> int:
        return sum(process.is_alive() for process in self._sites)

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def ask(self, node: int, payload: bytes, timeout: float = DEADLINE) -> list[Message]:
        message = Message(wrap(payload), node, "train", group_id="1")
        return list(self.grid.send_and_receive([message], timeout=timeout))

    def end_sites(self) -> None:
        """As before anybody came: nobody is connected, and no message is left for anybody."""
        for process in self._sites:
            process.kill()
            process.join()
        self._sites.clear()
        self.grid._largest = LARGEST
        for name in ("a", "b"):
            connection = self.connection(name)
            connection.activate()
            left = True
            while left:
                with suppress(ServerRefused):  # one that is too large
                    left = connection.pull() is not None
            connection.leave()
            connection.close()
        assert self.grid.activations() == {}

    def close(self) -> None:
        for process in self._sites:
            process.kill()
            process.join()
        self.grid.close()
        self.link.close()


@pytest.fixture(scope="module", params=[False, True], ids=["memory", "disk"])
def shared(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Network]:
    """Two networks for all tests of this file: it takes seconds to start one."""
    made = Network(tmp_path_factory.mktemp("network"), request.param)
    yield made
    made.close()


@pytest.fixture
def network(shared: Network) -> Iterator[Network]:
    # In whose name a message is made is a global of Flower.
    internals.become_task(shared.link.ticket.run_id, internals.SERVER_NODE)
    yield shared
    shared.end_sites()


@pytest.fixture
def own_network(tmp_path: Path) -> Iterator[Network]:
    """One that a test may end."""
    made = Network(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("size", [0, 1, 1000, 256 << 10, (256 << 10) + 1, 12_000_000])
def test_payloads_arrive_as_they_are(network: Network, size: int) -> None:
    """Small ones with the head of a message, large ones in pieces."""
    network.site("a", lambda payload: payload[::-1])
    [node] = network.grid.activations()
    payload = os.urandom(size)
    [answer] = network.ask(node, payload)
    assert unwrap(answer) == payload[::-1]
    assert answer.metadata.src_node_id == node


def test_answers_come_as_they_arrive_and_each_once(network: Network) -> None:
    network.site("a", lambda payload: b"a" + payload)
    network.site("b", lambda payload: b"b" + payload)
    nodes = sorted(network.grid.activations())
    assert len(nodes) == 2
    for turn in range(3):
        messages = [Message(wrap(b"%d" % turn), node, "query", group_id="1") for node in nodes]
        answers = list(network.grid.send_and_receive(messages, timeout=DEADLINE))
        assert sorted(unwrap(answer) for answer in answers) == [b"a%d" % turn, b"b%d" % turn]


def test_whoever_comes_back_is_asked_again(network: Network) -> None:
    """Killed with the request in its hands; the connection's silence was not noticed yet."""
    first = network.site("a", lambda _: b"never said", silent=99)
    [node] = network.grid.activations()
    answers: list[Message] = []
    message = Message(wrap(b"question"), node, "train", group_id="1")
    waiting = network.grid.send_and_receive([message], timeout=DEADLINE)

    def replace() -> None:
        time.sleep(1.0)  # for the request to be taken; if it was not, the test is only easier
        first.kill()
        first.join()
        network.site("a", lambda payload: payload.upper())

    thread = threading.Thread(target=replace)
    thread.start()
    answers = list(waiting)
    thread.join()
    assert [unwrap(answer) for answer in answers] == [b"QUESTION"]


def test_whoever_is_gone_is_not_waited_for(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_grid, "GONE_SECONDS", 0.5)
    connection = network.connection("a")
    connection.activate()
    [node] = network.grid.activations()
    connection.leave()
    assert network.grid.activations() == {}
    started = time.monotonic()
    [answer] = network.ask(node, b"anyone?", timeout=DEADLINE)
    assert answer.has_error()
    assert answer.error.reason == "disconnected"
    assert time.monotonic() - started < DEADLINE / 2


def test_a_late_answer_is_nobodys(network: Network) -> None:
    network.site("a", lambda payload: (time.sleep(1.0), payload)[1])
    [node] = network.grid.activations()
    assert network.ask(node, b"one", timeout=0.2) == []
    [answer] = network.ask(node, b"two")
    assert unwrap(answer) == b"two"


def test_whether_a_site_is_let_in_can_be_asked(network: Network) -> None:
    """By one that is connected too: its connection is the same as before, and no other is made."""
    connected = network.connection("a")
    assert connected.is_admitted()
    assert network.grid.activations() == {}
    connected.activate()
    before = network.grid.activations()
    assert len(before) == 1
    asking = network.connection("a")
    asking._time.offset = datetime.timedelta(minutes=10)  # with a clock that is wrong
    assert asking.is_admitted()
    assert network.grid.activations() == before
    connected.beat()
    assert not network.connection("c").is_admitted()
    assert network.grid.activations() == before


@pytest.mark.parametrize("minutes", [-600, -10, 10, 600])
def test_clocks_may_differ(network: Network, minutes: int) -> None:
    connection = network.connection("a")
    # As if this machine's clock were wrong by so much, and nobody had noticed.
    connection._time.offset = datetime.timedelta(minutes=minutes)
    connection.activate()
    connection.beat()
    assert connection.pull() is None
    assert abs(connection.clock_offset) < 30
    connection.close()


def test_a_stranger_is_refused_and_told_why(network: Network) -> None:
    with pytest.raises(ServerRefused, match="no such transport key"):
        network.connection("c").activate()


def test_another_sites_connection_cannot_be_used(network: Network) -> None:
    one, other = network.connection("a"), network.connection("b")
    one.activate()
    other.activate()
    other._node = one._node
    with pytest.raises(ServerRefused):
        other.pull()
    with pytest.raises(ServerRefused):
        other.beat()


def test_without_the_token_nothing_is_sent(network: Network) -> None:
    ticket = RunTicket(network.link.ticket.run_id, "00" * 16)
    stranger = FleetGrid(network.link.address, ticket, 1000)
    with pytest.raises(ServerRefused):
        stranger.activations()
    network.grid.activations()


def test_nobody_answers(own_network: Network) -> None:
    connection = own_network.connection("a")
    own_network.link.close()
    with pytest.raises(ServerUnreachable):
        connection.activate()
    with pytest.raises(ServerUnreachable):
        own_network.grid.activations()


def test_a_port_that_is_taken_is_told(network: Network, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1:{network.link.port}"):
        SuperLinkProcess(replace(network.doors(network.link.port), log=tmp_path / "log"), {})


@pytest.mark.parametrize("alike", [False, True])
def test_a_message_that_is_too_large_is_not_taken(network: Network, alike: bool) -> None:
    """A site knows how long the longest request of its federation is.

    Pieces that are alike are one object that is named many times: it is fetched once, and put
    together to any length.
    """
    connection = network.connection("a", largest=1_000_000)
    connection.activate()
    [node] = network.grid.activations()
    content = bytes(100_000_000) if alike else os.urandom(100_000_000)
    network.grid.push_messages([Message(wrap(content), node, "train", group_id="1")])
    del content
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ServerRefused, match="pieces"):
        connection.pull()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


@pytest.mark.parametrize("length", [b"content-length: 999999999", b"x-nothing: here"])
def test_an_answer_without_end_is_not_read(length: bytes, tmp_path: Path) -> None:
    """From a server that is not Flower's: with the right certificate, and endless bytes."""
    make_server_keys(tmp_path / "server", ["127.0.0.1"])
    make_site_keys(tmp_path / "a", "a")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(
        tmp_path / "server" / SERVER_CERTIFICATE, tmp_path / "server" / SERVER_KEY
    )
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]

        def serve() -> None:
            connection = context.wrap_socket(door.accept()[0], server_side=True)
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\n" + length + b"\r\n\r\n")
            with suppress(OSError):
                while True:
                    connection.sendall(bytes(65536))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        authority = (tmp_path / "server" / AUTHORITY).read_bytes()
        transport = read_site_keys(tmp_path / "a", "a").transport
        connection = NodeConnection(
            f"127.0.0.1:{port}", authority, transport, 1_000_000, lambda _done, _total: None
        )
        with pytest.raises(ServerRefused, match="bytes"):
            connection.activate()
        connection.close()
        thread.join(DEADLINE)
        assert not thread.is_alive()


def test_an_answer_that_is_too_large_fails_its_client_alone(network: Network) -> None:
    network.site("a", lambda payload: bytes(200_000_000))
    [node] = network.grid.activations()
    [answer] = network.ask(node, b"a little")
    assert "pieces" in answer.error.reason
    assert answer.metadata.src_node_id == node


def _always() -> Participation:
    """Of a site whose owner has set no conditions."""
    return Participation(SiteFiles(Path("client.toml"), ClientConfig(), Config()), print)


class _Worker:
    """Answers by what it was asked, as a training process does."""

    def __init__(self, largest_answer: int = 0) -> None:
        self._length = largest_answer

    def ask(self, question: bytes, payload: bytes) -> None:
        self._asked = question, payload if len(payload) < 100 else b""

    def answer(self, look: Callable[[], None]) -> bytes:
        question, payload = self._asked
        if question == b"c":
            raise ProtocolViolation("not now")
        if self._length:
            return os.urandom(self._length)
        if question == b"t":
            raise TrainingError("raised RuntimeError")
        return question + payload


def test_a_site_answers_whatever_it_is_asked(network: Network, tmp_path: Path) -> None:
    """Nonsense and failures end in an answer with an error, and the site goes on."""
    said = tmp_path / "said"

    def say(text: str) -> None:
        with said.open("a") as file:
            file.write(f"{text}\n")

    def work() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        connection = network.connection("a")
        os._exit(_Site(connection, _Worker(), _always(), False, say, "the server").run())

    process = _FORK.Process(target=work, daemon=True)
    process.start()
    network._sites.append(process)
    network.wait(lambda: len(network.grid.activations()) == 1)
    [node] = network.grid.activations()

    def ask(kind: str, content: RecordDict) -> Message:
        message = Message(content, node, kind, group_id="1")
        [answer] = network.grid.send_and_receive([message], timeout=DEADLINE)
        return answer

    for kind, content, reason in (
        ("query.nonsense", wrap(b"?"), "not a question for a site"),
        ("train.elsewhere", wrap(b"?"), "not a question for a site"),
        ("query", RecordDict(), "without a fedtune payload"),
        ("query.secagg", wrap(b"?"), "not now"),
        ("query.over", RecordDict(), "without a fedtune payload"),
    ):
        assert reason in ask(kind, content).error.reason, kind
    assert ask("train", wrap(b"?")).error.reason == "raised RuntimeError"
    assert unwrap(ask("query", wrap(b"you"))) == b"hyou"
    assert unwrap(ask("evaluate", wrap(b"score"))) == b"escore"
    assert process.is_alive()


@pytest.mark.parametrize("shared", [False], indirect=True, ids=["memory"])
def test_a_large_message_is_in_a_sites_memory_once(network: Network, tmp_path: Path) -> None:
    """The request is let go before the answer comes, and neither is held twice."""
    size, peaks = 60_000_000, tmp_path / "peaks"
    network.grid._largest = 2 * size

    def memory(name: str) -> int:
        [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if name in x]
        return int(line.split()[1]) * 1024

    def work() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        connection = network.connection("a", largest=2 * size)
        connection.activate()
        site = _Site(connection, _Worker(size), _always(), False, lambda _: None, "the server")
        while (message := connection.pull()) is None:
            time.sleep(0.01)
        site._answer(message)  # once before: what it takes to answer at all is not counted
        while (message := connection.pull()) is None:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = memory("VmRSS")
            time.sleep(0.01)
        site._answer(message)
        peaks.write_text(f"{memory('VmHWM') - before}")

    process = _FORK.Process(target=work, daemon=True)
    process.start()
    network._sites.append(process)
    network.wait(lambda: len(network.grid.activations()) == 1)
    [node] = network.grid.activations()
    for payload in (b"", os.urandom(size)):
        [answer] = network.ask(node, payload)
        assert len(unwrap(answer)) == size
    process.join(DEADLINE)
    # Beside it some pieces, and what it takes to answer; held twice it would be twice the size.
    assert int(peaks.read_text()) < size + 40_000_000


class _Proxy:
    """Carries bytes to a port, and cuts each connection after so many."""

    def __init__(self, port: int, cut_after: int) -> None:
        self._port, self._cut_after = port, cut_after
        self.carried, self.cuts = 0, 0
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._door.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._door.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near = self._door.accept()[0]
                far = socket.create_connection(("127.0.0.1", self._port))
                left = [self._cut_after]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(*pair, left), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, left: list[int]) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self.carried += len(data)
                left[0] -= len(data)
                if left[0] < 0:
                    self.cuts += 1
                    break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("shared", [False], indirect=True, ids=["memory"])
def test_what_got_through_a_broken_line_is_not_sent_again(network: Network) -> None:
    """Each connection is cut after 12 MB; 40 MB go down and up again all the same."""
    size = 40_000_000
    network.grid._largest = 2 * size
    proxy = _Proxy(network.link.port, 12_000_000)
    connection = network.connection("a", largest=2 * size, port=proxy.port)

    def work() -> None:
        connection.activate()
        while (message := connection.pull()) is None:
            time.sleep(0.01)
        connection.push(reply(message, unwrap(message)[::-1]), 0.0)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    network.wait(lambda: len(network.grid.activations()) == 1)
    [node] = network.grid.activations()
    payload = os.urandom(size)
    [answer] = network.ask(node, payload)
    thread.join(DEADLINE)
    assert unwrap(answer) == payload[::-1]
    assert proxy.cuts >= 6
    # At most one piece of 5 MiB is lost with each connection.
    assert proxy.carried < 2 * size + (proxy.cuts + 1) * 5.3e6
    proxy.close()


def test_half_an_answer_keeps_nobody_waiting(network: Network) -> None:
    """A site that sends the head of an answer and never the rest is the only one not heard."""
    network.site("b", lambda payload: b"b" + payload)
    other = network.connection("a")
    other.activate()
    nodes = sorted(network.grid.activations())
    messages = [Message(wrap(b"?"), node, "query", group_id="1") for node in nodes]
    waiting = network.grid.send_and_receive(messages, timeout=3.0)

    def half() -> None:
        while (message := other.pull()) is None:
            time.sleep(0.01)
        # The first piece is refused by the line, and so it ends after the head.
        other._client.PushObject = None
        with suppress(ServerRefused):
            other.push(reply(message, os.urandom(1_000_000)), 0.0)

    thread = threading.Thread(target=half)
    thread.start()
    started = time.monotonic()
    assert unwrap(next(waiting)) == b"b?"
    assert list(waiting) == []
    assert 2.5 < time.monotonic() - started < DEADLINE
    thread.join()


def test_a_site_that_has_heard_that_the_run_is_over_ends_without_the_server(
    own_network: Network,
) -> None:
    link = own_network.link._process.pid

    class Cut(NodeConnection):
        def push(self, answer: Message, seconds: float) -> None:
            os.kill(link, signal.SIGKILL)
            super().push(answer, seconds)

    def work() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        connection = own_network.connection("a", kind=Cut)
        os._exit(_Site(connection, _Worker(), _always(), True, print, "the server").run())

    process = _FORK.Process(target=work, daemon=True)
    process.start()
    own_network._sites.append(process)
    own_network.wait(lambda: len(own_network.grid.activations()) == 1)
    [node] = own_network.grid.activations()
    own_network.grid.push_messages([Message(wrap(b"3 rounds"), node, FAREWELL)])
    process.join(DEADLINE)
    assert process.exitcode == 0


def test_old_versions_of_tls_are_refused(network: Network) -> None:
    context = ssl.create_default_context(cafile=str(network.folder / "server" / AUTHORITY))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(httpx.ConnectError), httpx.Client(verify=context) as http:
        http.get(f"https://127.0.0.1:{network.link.port}/")


def test_it_ends_when_its_server_is_killed_and_the_next_one_waits_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its standard input closes: no process of ours is left behind, and none is in the way."""
    reader, writer = os.pipe()

    def server() -> None:
        made = Network(tmp_path)
        os.write(writer, f"{made.link._process.pid} {made.link.port}\n".encode())
        time.sleep(DEADLINE)

    process = _FORK.Process(target=server)
    process.start()
    with os.fdopen(reader) as lines:
        link, port = map(int, lines.readline().split())
    os.close(writer)
    os.kill(link, signal.SIGSTOP)  # as slow as it can be
    process.kill()
    process.join()
    keys = tmp_path / "server"
    log = tmp_path / "superlink.log"
    doors = Doors("127.0.0.1", port, keys / SERVER_CERTIFICATE, keys / SERVER_KEY, None, log)
    with monkeypatch.context() as patch:
        patch.setattr(superlink, "LAST_SECONDS", 0.2)
        with pytest.raises(ConfigError, match="earlier server still runs"):
            SuperLinkProcess(doors, {})
    os.kill(link, signal.SIGCONT)
    with SuperLinkProcess(doors, {}) as again:
        assert again.port == port
        state = Path(f"/proc/{link}/stat")
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"
