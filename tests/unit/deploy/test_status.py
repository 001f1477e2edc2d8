"""What a server tells of its run, as Prometheus reads it; and who asks for it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http import HTTPStatus

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedtune.deploy import status_server
from fedtune.deploy.metrics import Metrics
from fedtune.deploy.status import SILENT_SECONDS, Status
from fedtune.deploy.status_server import Answer, StatusServer, health
from fedtune.errors import ConfigError
from fedtune.records import RoundRecord
from fedtune.split.counters import Counters, SplitStatus
from fedtune.train.channel import CutTraffic
from fedtune.wire.split import Reason

CLIENTS = ["b", 'a "quoted"\nname', "ç"]


def record(number: int, seconds: float = 4.0, clients: tuple[str, ...] = ("b",)) -> RoundRecord:
    return RoundRecord(number, 1.0, 1.0, 0.5, clients, {}, 100 * number, 7, seconds, 2.5)


class Clock:
    """A clock that goes when it is told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def samples(status: Status, base: Callable[[], SplitStatus] | None = None) -> dict[str, float]:
    """Every sample of a scrape, read by Prometheus' own parser; name and labels as one text."""
    text = Metrics(lambda: status.snapshot, {"server.crt": 1.9e9}, base).text().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_metrics_are_of_the_journal_and_of_what_happened_since() -> None:
    status = Status(CLIENTS, 10, [record(1, 0.5), record(2, 45.0, ())], 600.0)
    status.looked(frozenset({"b", "somebody else"}))
    status.round_running(3, "train", ["b", "ç"], 3)
    status.client_failed("b", "late")
    status.client_failed("b", "late")
    status.client_failed("ç", "invalid")
    found = samples(status)
    assert found["fedtune_round"] == 3
    assert found["fedtune_rounds_planned"] == 10
    assert found["fedtune_rounds_committed_total"] == 2
    assert found["fedtune_rounds_lost_total"] == 1
    assert found["fedtune_clients_registered"] == 3
    assert found["fedtune_clients_waited_for"] == 2
    assert found["fedtune_received_bytes_total"] == 300
    assert found["fedtune_sent_bytes_total"] == 14
    assert found["fedtune_train_seconds_total"] == 5.0
    # Who is not in the roster is no label and is not counted.
    assert found["fedtune_clients_connected"] == 1
    names = {
        name: value for name, value in found.items() if name.startswith("fedtune_client_connected")
    }
    assert names == {
        "fedtune_client_connected{client=b}": 1,
        'fedtune_client_connected{client=a "quoted"\nname}': 0,
        "fedtune_client_connected{client=ç}": 0,
    }
    failures = [found[f"fedtune_client_failures_total{{reason={r}}}"] for r in ("late", "invalid")]
    assert failures == [2, 1]
    assert found["fedtune_client_failures_total{reason=refused}"] == 0
    assert found["fedtune_certificate_not_after_seconds{certificate=server.crt}"] == 1.9e9
    assert "fedtune_epsilon_spent" not in found

    before = time.time()
    assert found["fedtune_last_commit_timestamp_seconds"] <= before
    status.round_committed(record(3, 4.0))
    found = samples(status)
    assert before <= found["fedtune_last_commit_timestamp_seconds"] <= time.time()
    assert found["fedtune_rounds_committed_total"] == 3
    assert found["fedtune_clients_waited_for"] == 0
    # Rounds of 0.5, 45 and 4 seconds.
    bounds = {"1.0": 1, "2.5": 1, "5.0": 2, "30.0": 2, "60.0": 3, "+Inf": 3}
    for bound, number in bounds.items():
        assert found[f"fedtune_round_seconds_bucket{{le={bound}}}"] == number
    assert found["fedtune_round_seconds_count"] == 3
    assert found["fedtune_round_seconds_sum"] == 49.5


def test_the_base_model_that_it_serves_is_told_of_too() -> None:
    counters = Counters()
    counters.batch(5, [0.25, 0.5])
    counters.not_answered(Reason.BUSY)
    counters.passed("b", CutTraffic(trained=5, tokens=40, up=900, down=700))
    counters.passed("b", CutTraffic(up=100, down=50, evaluated=2, evaluation_bytes=150))
    status = Status(CLIENTS, 10, [], 600.0)
    found = samples(status, lambda: counters.status)
    expected = {"batches": 1, "requests": 2, "examples": 5, "queue_seconds": 0.75}
    assert {name: found[f"fedtune_base_{name}_total"] for name in expected} == expected
    assert found["fedtune_base_not_answered_total{reason=busy}"] == 1
    assert found["fedtune_base_not_answered_total{reason=late}"] == 0
    assert found["fedtune_base_received_bytes_total{client=b}"] == 1000
    assert found["fedtune_base_sent_bytes_total{client=b}"] == 750
    assert not any(name.startswith("fedtune_base") for name in samples(status))


def test_a_client_cannot_turn_a_counter_back() -> None:
    status = Status(CLIENTS, 10, [record(1)], 600.0)
    boast = RoundRecord(2, None, None, None, ("b",), {}, 1, 1, 1.0, -1e300)
    status.round_committed(boast)
    assert samples(status)["fedtune_train_seconds_total"] == 2.5


def test_epsilon_is_told_where_the_server_accounts_for_it() -> None:
    spent = iter([0.0, 1.25])
    status = Status(CLIENTS, 10, [], 600.0, lambda: next(spent))
    assert samples(status)["fedtune_epsilon_spent"] == 0
    status.round_committed(record(1))
    assert samples(status)["fedtune_epsilon_spent"] == 1.25


def test_names_keep_to_the_guidelines_and_each_has_its_words() -> None:
    status = Status(CLIENTS, 10, [], 600.0)
    base = SplitStatus(traffic={"b": CutTraffic()})
    text = Metrics(lambda: status.snapshot, {}, lambda: base).text().decode()
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families) > 10
    for family in families:
        assert family.name.startswith("fedtune_")
        assert family.documentation
        if family.type == "counter":
            assert f"\n{family.name}_total" in text


@pytest.mark.parametrize("stage", ["waiting for clients", "waiting for answers", "computing"])
def test_silence_is_trouble_after_as_long_as_it_can_take(stage: str) -> None:
    clock, patience = Clock(), 300.0
    status = Status(CLIENTS, 10, [], patience, clock=clock)
    if stage == "waiting for clients":
        status.waiting(1, 3)
    else:
        status.round_running(1, "evaluate", [] if stage == "computing" else ["b"], 3)
    limit = patience if stage == "computing" else SILENT_SECONDS
    clock.now += limit - 1
    assert status.trouble() == ""
    clock.now += 2
    assert f"no sign of life for {limit + 1:.0f} s" in status.trouble()
    status.looked(frozenset())
    assert status.trouble() == ""


def test_health_is_the_state_of_the_run() -> None:
    status = Status(CLIENTS, 10, [record(1), record(2)], 600.0)
    assert (status.to_json()["state"], status.to_json()["round"]) == ("starting", 2)
    status.looked(frozenset({"b"}))
    status.round_running(3, "sign", ["b"], 3)
    said = status.to_json()
    assert (said["state"], said["round"], said["stage"]) == ("running", 3, "sign")
    assert (said["waiting_for"], said["connected"]) == (["b"], ["b"])
    assert said["missing"] == sorted(set(CLIENTS) - {"b"})
    assert said["seconds_since_commit"] is None
    status.round_committed(record(3))
    assert 0 <= status.to_json()["seconds_since_commit"] < 5
    status.ended("failed", "too few clients")
    assert status.trouble() == "the run failed: too few clients"
    status.ended("finished")
    assert (status.trouble(), status.to_json()["state"]) == ("", "finished")


class Server:
    """A status server, and whether it is held up."""

    def __init__(self) -> None:
        self.trouble = ""
        self.go_on = threading.Event()
        self.go_on.set()
        routes = {"/health": self._health, "/broken": self._broken}
        self.server = StatusServer(("127.0.0.1", 0), routes)

    def _health(self) -> Answer:
        self.go_on.wait(10)
        return health({"round": 3}, self.trouble)

    def _broken(self) -> Answer:
        raise RuntimeError("a fault of ours")

    def ask(self, path: str = "/health", method: str = "GET") -> httpx.Response:
        return httpx.request(method, f"http://127.0.0.1:{self.server.port}{path}")

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.server.port), 10)


@pytest.fixture
def served() -> Iterator[Server]:
    made = Server()
    with made.server:
        yield made
        made.go_on.set()


def test_health_is_200_or_503_with_a_reason(served: Server) -> None:
    answer = served.ask()
    assert (answer.status_code, answer.json()) == (200, {"status": "ok", "round": 3})
    served.trouble = "nothing moves"
    answer = served.ask("/health?verbose=1")
    assert answer.status_code == 503
    assert answer.json() == {"status": "failing", "reason": "nothing moves", "round": 3}
    assert answer.headers["content-type"] == "application/json"


def test_nothing_else_is_there(served: Server) -> None:
    for path in ("/", "/healthz", "/health/", "/metrics.txt"):
        assert served.ask(path).status_code == 404
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "NONSENSE"):
        assert served.ask(method=method).status_code == 405
    assert served.ask().status_code == 200


def sent_until_cut(connection: socket.socket, piece: bytes) -> int:
    """Send pieces, one each 50 ms, until the other side has closed; how many went out."""
    connection.settimeout(0.05)
    for number in range(200):
        try:
            connection.sendall(piece)
            assert connection.recv(100) == b""  # nothing is said to it
            return number
        except TimeoutError:
            continue
        except ConnectionError:
            return number
    raise AssertionError("the connection stays open")


def test_what_it_takes_in_is_bounded(served: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    start = b"GET /health HTTP/1.1\r\nx: "
    with served.connect() as large:
        large.sendall(start)
        # Far from the time limit.
        assert sent_until_cut(large, b"y" * (status_server.LARGEST_REQUEST // 2)) <= 4
    monkeypatch.setattr(status_server, "REQUEST_SECONDS", 0.3)
    with served.connect() as slow:
        slow.sendall(start)
        # A byte now and then does not keep a connection open.
        assert 2 <= sent_until_cut(slow, b"y") <= 100
    assert served.ask().status_code == 200


def test_many_that_do_nothing_are_turned_away_and_not_kept(
    served: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_server, "REQUEST_SECONDS", 1.0)
    idle = [served.connect() for _ in range(status_server.MOST_REQUESTS)]
    with closing(served.connect()) as one_more:
        assert one_more.recv(100) == b""
    idle[0].setblocking(False)
    with pytest.raises(BlockingIOError):  # still open
        idle[0].recv(100)
    for connection in idle:
        connection.settimeout(10)
        assert connection.recv(100) == b""  # their time is over
        connection.close()
    assert served.ask().status_code == 200


def test_a_fault_of_its_own_ends_nothing_and_is_said(
    served: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        served.ask("/broken")
    assert served.ask().status_code == 200
    [said] = [r for r in caplog.records if r.name == status_server.logger.name]
    assert "was not answered" in said.message


def test_an_address_that_cannot_be_had_is_named(served: Server) -> None:
    taken = ("127.0.0.1", served.server.port)
    for address in (taken, ("192.0.2.7", 9093), ("no such host.invalid", 1)):
        with pytest.raises(ConfigError, match=rf"server\.status: .*{address[0]}:{address[1]}"):
            StatusServer(address, {})


def test_requests_do_not_hold_each_other_up(served: Server) -> None:
    served.go_on.clear()
    answers: list[int] = []
    waiting = threading.Thread(target=lambda: answers.append(served.ask().status_code))
    waiting.start()
    assert served.ask("/nothing").status_code == 404
    assert answers == []
    served.go_on.set()
    waiting.join(10)
    assert answers == [HTTPStatus.OK]


def test_health_is_json_that_holds_any_name() -> None:
    status = Status(CLIENTS, 1, [], 60.0)
    _, _, content = health(status.to_json(), "")
    assert json.loads(content)["missing"] == sorted(CLIENTS)
