"""What fedtune relies on in Flower's internals, and our grid on top of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from fedtune.errors import ClientFailure, MalformedMessage, TrainingError
from fedtune.flower import internals
from fedtune.flower.client_app import make_client_app
from fedtune.flower.envelope import CLIENT_FAILED, CLIENT_REFUSED, unwrap, wrap
from fedtune.flower.grid import FIRST_NODE, KIND, LocalGrid, message_handler
from fedtune.flower.pool import ForkPool, InlinePool, Pool

PAYLOAD = bytes(range(256)) * 10


@pytest.fixture(autouse=True)
def _as_server() -> Iterator[None]:
    internals.become_task(1, internals.SERVER_NODE)
    yield
    internals.become_task(1, internals.SERVER_NODE)


def _message(payload: bytes = PAYLOAD, node: int = 5, group: str = "7") -> Message:
    return Message(wrap(payload), node, "train", group_id=group)


def test_an_envelope_gives_back_its_payload():
    for payload in (b"", b"\0", PAYLOAD):
        assert unwrap(_message(payload)) == payload


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"fedtune": ArrayRecord({})}),
        RecordDict({"fedtune": ArrayRecord({"payload": Array("uint8", (1,), "numpy", b"x")})}),
        RecordDict({"other": wrap(b"x").array_records["fedtune"]}),
        RecordDict({"fedtune": ConfigRecord({"payload": b"x"})}),
    ],
)
def test_a_message_without_a_payload_of_ours_is_refused(content: RecordDict):
    with pytest.raises(MalformedMessage):
        unwrap(Message(content, 5, "train"))


@pytest.mark.parametrize(
    "passage",
    [
        lambda m: internals.message_from_bytes(internals.message_to_bytes(m)),
        internals.through_network_format,
    ],
    ids=["bytes", "network"],
)
def test_a_message_passes_with_its_payload_and_metadata(passage: Callable[[Message], Message]):
    sent = _message()
    internals.set_message_id(sent, "an-id")
    sent.content["numbers"] = MetricRecord({"x": 0.1, "n": [1, 2]})
    got = passage(sent)
    assert unwrap(got) == PAYLOAD
    assert dict(got.content["numbers"]) == {"x": 0.1, "n": [1, 2]}
    for name in ("message_id", "src_node_id", "dst_node_id", "group_id", "message_type", "run_id"):
        assert getattr(got.metadata, name) == getattr(sent.metadata, name), name
    assert got.metadata.message_id == "an-id"
    assert (got.metadata.src_node_id, got.metadata.dst_node_id) == (1, 5)
    assert (got.metadata.group_id, got.metadata.message_type) == ("7", "train")
    answer = Message(wrap(b"answer"), reply_to=got)
    assert answer.metadata.reply_to_message_id == "an-id"
    assert answer.metadata.dst_node_id == 1


def test_messages_come_from_whoever_this_process_is():
    internals.become_task(9, 4)
    message = _message()
    assert message.metadata.src_node_id == 4
    assert message.metadata.run_id == 9


@pytest.mark.parametrize(
    "module",
    [
        "fedtune.flower.grid",
        "fedtune.flower.client_app",
        "fedtune.flower.strategy",
        "fedtune.simulation.commands",
        "fedtune.simulation.workers",
    ],
)
def test_flower_is_told_not_to_phone_home_before_it_is_imported(module: str, run_python):
    code = (
        f"import {module}\nfrom flwr.supercore import telemetry\n"
        "print(telemetry.FLWR_TELEMETRY_ENABLED)"
    )
    assert run_python(code).stdout.strip() == "0"


def _echo_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def echo(message: Message, context: Context) -> Message:
        partition = context.node_config["partition-id"]
        total = context.node_config["num-partitions"]
        if partition == 2:
            raise ValueError("no echo here")
        payload = unwrap(message) + f" {partition}/{total} {context.node_id}".encode()
        return Message(wrap(payload), reply_to=message)

    return app


def _grid(wire: bool, fork: bool) -> tuple[LocalGrid, Pool]:
    handlers = {KIND: message_handler(_echo_app(), 4, wire)}
    pool: Pool = ForkPool(handlers, 2) if fork else InlinePool(handlers)
    return LocalGrid(pool, 4), pool


@pytest.mark.parametrize("wire", [False, True], ids=["direct", "wire"])
@pytest.mark.parametrize("fork", [False, True], ids=["inline", "fork"])
def test_the_grid_carries_messages_to_their_nodes_and_back(wire: bool, fork: bool):
    grid, pool = _grid(wire, fork)
    nodes = list(grid.get_node_ids())
    assert nodes == [2, 3, 4, 5]
    messages = [_message(f"to {node}".encode(), node) for node in nodes]
    answers = list(grid.send_and_receive(messages, timeout=60))
    pool.close()
    by_node = {answer.metadata.src_node_id: answer for answer in answers}
    assert len(answers) == 4
    assert sorted(by_node) == nodes
    for sent in messages:
        node = sent.metadata.dst_node_id
        answer = by_node[node]
        assert answer.metadata.reply_to_message_id == sent.metadata.message_id
        assert answer.metadata.dst_node_id == internals.SERVER_NODE
        if node - FIRST_NODE == 2:
            assert answer.error.code == CLIENT_FAILED
            assert "no echo here" in answer.error.reason
        else:
            place = node - FIRST_NODE
            assert unwrap(answer) == f"to {node} {place}/4 {node}".encode()


@pytest.mark.parametrize(
    "fork",
    [
        pytest.param(
            False,
        ),
        True,
    ],
    ids=["inline", "fork"],
)
def test_the_server_is_the_server_again_after_its_clients_worked(fork: bool):
    grid, pool = _grid(wire=False, fork=fork)
    list(grid.send_and_receive([_message(node=2), _message(node=3)]))
    pool.close()
    assert TaskIdentity.node_id == internals.SERVER_NODE
    assert _message().metadata.src_node_id == internals.SERVER_NODE


def test_pushed_messages_are_pulled_once():
    grid, pool = _grid(wire=False, fork=False)
    ids = list(grid.push_messages([_message(b"a", 2), _message(b"b", 3)]))
    assert len(set(ids)) == 2
    assert [unwrap(m) for m in grid.pull_messages(ids[:1])] == [b"a 0/4 2"]
    assert [unwrap(m) for m in grid.pull_messages(ids)] == [b"b 1/4 3"]
    pool.close()


def _answer(machine: object, *, disclose: bool = False, kind: str = "train") -> Message:
    """What the client app answers when its machine is `machine`."""
    app = make_client_app(lambda _context: machine, disclose_errors=disclose)  # type: ignore[arg-type, return-value]
    message = Message(wrap(b"request"), 5, kind)
    internals.set_message_id(message, "id")
    context = Context(run_id=1, node_id=5, node_config={}, state=RecordDict(), run_config={})
    internals.become_task(1, 5)
    return app(message, context)


class _Raising:
    """A machine whose every answer is the same error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def train(self, _payload: bytes) -> bytes:
        raise self._error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MalformedMessage("adapter too short"), CLIENT_REFUSED),
        (TrainingError("diverged"), CLIENT_FAILED),
        (ClientFailure("lost"), CLIENT_FAILED),
    ],
)
def test_errors_of_fedtune_reach_the_server_in_their_own_words(error, code):
    answer = _answer(_Raising(error))
    assert (answer.error.code, answer.error.reason) == (code, str(error))


def test_any_other_error_is_only_named():
    answer = _answer(_Raising(KeyError("patient 4711")))
    assert "KeyError" in answer.error.reason
    assert "4711" not in answer.error.reason
    told = _answer(_Raising(KeyError("patient 4711")), disclose=True)
    assert "KeyError" in told.error.reason
    assert "4711" in told.error.reason


def test_each_kind_of_message_has_its_handler(small_federation):
    from fedtune.wire import codec

    machine = small_federation().machines[0]
    request = codec.encode_hello_request("study")
    app = make_client_app(lambda _context: machine)
    message = Message(wrap(request), 5, "query")
    internals.set_message_id(message, "id")
    context = Context(run_id=1, node_id=5, node_config={}, state=RecordDict(), run_config={})
    internals.become_task(1, 5)
    assert codec.decode_hello(unwrap(app(message, context))).client == "client-0"
    for kind in ("train", "evaluate"):
        refused = Message(wrap(request), 5, kind)
        internals.set_message_id(refused, "id")
        assert app(refused, context).error.code == CLIENT_REFUSED
