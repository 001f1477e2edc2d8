"""One session of Flower's own SecAgg+, its real client and server code; see `../secagg.py`.

The server is `SecAggPlusWorkflow`, called as a ServerApp calls it; a client is
`secaggplus_mod` with a context of its own. Only what lies between and around them is replaced:

- the grid, by one that passes each message through Flower's protobuf encoding (outside the
  time) and calls the mod of one client after the other;
- the strategy, by one that asks every client and keeps the average as it comes;
- training, by a vector that is there already.

Time is taken where the workflow hands over to the grid and where the mod is called.
"""

from __future__ import annotations

import importlib
import logging
import random
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common import Code, FitIns, FitRes, Parameters, Status
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.compat.common import recorddict_compat as compat
from flwr.compat.common.parameter import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.server.workflow.secure_aggregation import secaggplus_workflow as workflow
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

# The package gives its function the name of its module.
mod = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")

WEIGHT = 1000  # number of examples of each client, and Flower's default for the largest weight
CLIP, STEPS = 8.0, 1 << 22  # Flower's defaults: [-8, 8] in 2^22 steps, masks modulo 2^32
COLLECT = 2  # the third of four exchanges between server and clients
# Stochastic rounding is off by less than one step, float32 arithmetic before it by 1/8.
MOST_STEPS = 1.25


@dataclass(frozen=True)
class Session:
    """Figures of one session, of fedtune or of Flower; seconds of one client: one per client."""

    client_s: list[float]  # all it does
    masking_s: list[float]  # of these: from its vector to the packed masked vector
    server_s: float  # all it does
    unmask_s: float  # of these: from the last answer to the sum
    bytes_up: int  # of the client that sent the most
    masks: int  # that the server expands
    checked: bool  # every client sent its own vector, and the sum was right
    apart_client_s: float = 0.0  # Flower's quantization, in none of the above (median)
    apart_server_s: float = 0.0
    error_steps: float = 0.0  # largest error of the average, in steps of the quantization


class _Apart:
    """A stopwatch around functions whose time is not to be counted."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        return timed


@dataclass
class _Node:
    context: Context
    seconds: list[float] = field(default_factory=list)  # per exchange
    apart: float = 0.0
    sent: int = 0


class _Strategy:
    """Asks all clients; the result is what the workflow has put into each answer."""

    def __init__(self) -> None:
        self.average: NDArray[Any] | None = None

    def configure_fit(self, server_round: int, parameters: Parameters, manager: Any) -> Any:
        return [(proxy, FitIns(parameters, {})) for proxy in manager.proxies]

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        if failures:
            raise SystemExit(f"Flower: {failures[0]}")
        (self.average,) = parameters_to_ndarrays(results[0][1].parameters)
        return None, {}


class _Manager:
    def __init__(self, proxies: list[GridClientProxy]) -> None:
        self.proxies = proxies

    def num_available(self) -> int:
        return len(self.proxies)


class _Grid:
    """Calls the clients one after the other; whoever is in `dropped` sends no masked vector."""

    def __init__(
        self,
        clients: int,
        dropped: Collection[int],
        vector: Callable[[int], NDArray[np.float32]],
        sample: int,
        all_real: Callable[[list[float]], bool],
        apart: _Apart,
    ) -> None:
        self.nodes = {i: _Node(Context(1, i, {}, RecordDict(), {})) for i in range(1, clients + 1)}
        self.dropped = {place + 1 for place in dropped}
        self.real: list[int] = []
        self.server: list[float] = []  # seconds before, between and after the exchanges
        self.plain: NDArray[np.float64] | None = None
        self.left = 0.0
        self._vector = vector
        self._sample = sample
        self._all_real = all_real
        self._apart = apart

    def send_and_receive(self, messages: Sequence[Message], *, timeout: Any = None) -> list[Any]:
        """What the workflow calls four times."""
        self.server.append(time.perf_counter() - self.left)
        exchange = len(self.server) - 1
        if exchange == COLLECT:
            replies = self._collect(sorted(messages, key=lambda m: m.metadata.dst_node_id))
        else:
            replies = [self._answer(message, np.zeros(1, np.float32)) for message in messages]
        self.left = time.perf_counter()
        return replies

    def _collect(self, messages: list[Message]) -> list[Message]:
        """Real vectors from the first, and from the others if that is not too much.

        A stand-in goes through the mod with one value; then the server gets a copy of what a
        real client sent.
        """
        replies: list[Message] = []
        masking: list[float] = []
        everyone = True
        for message in messages:
            place = message.metadata.dst_node_id
            if place in self.dropped:
                continue
            if len(masking) == self._sample:
                everyone = self._all_real(masking)
            if everyone or len(masking) < self._sample:
                values = self._vector(place - 1)
                self.plain = values.astype(np.float64) + (0.0 if self.plain is None else self.plain)
                replies.append(self._answer(message, values))
                masking.append(self.nodes[place].seconds[-1])
                self.real.append(place)
            else:
                replies.append(self._answer(message, np.zeros(1, np.float32)))
                record = replies[-1].content.config_records[RECORD_KEY_CONFIGS]
                masked = replies[0].content.config_records[RECORD_KEY_CONFIGS]
                record[Key.MASKED_PARAMETERS] = masked[Key.MASKED_PARAMETERS]
        return replies

    def _answer(self, message: Message, values: NDArray[np.float32]) -> Message:
        node = self.nodes[message.metadata.dst_node_id]
        encoded = recorddict_to_proto(message.content).SerializeToString()
        content = recorddict_from_proto(ProtoRecordDict.FromString(encoded))
        trained = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([values]), WEIGHT, {})
        result = compat.fitres_to_recorddict(trained, keep_input=False)
        metadata = message.metadata
        received = Message(content, metadata.dst_node_id, metadata.message_type)
        before = self._apart.seconds
        started = time.perf_counter()
        reply: Message = mod.secaggplus_mod(
            received, node.context, lambda asked, _: Message(result, reply_to=asked)
        )
        seconds = time.perf_counter() - started
        apart = self._apart.seconds - before
        node.seconds.append(seconds - apart)
        node.apart += apart
        node.sent += reply.content.config_records[RECORD_KEY_CONFIGS].count_bytes()
        return reply


def run_flower(
    clients: int,
    neighbours: int,
    threshold: int,
    dropped: Collection[int],
    vector: Callable[[int], NDArray[np.float32]],
    sample: int,
    all_real: Callable[[list[float]], bool],
) -> Session:
    """One session: each client shares with `neighbours` others, `threshold` shares open.

    `vector` gives the update of a client; `all_real` says, after `sample` clients and from
    their seconds, whether all others shall send a vector of their own too. Exits if the
    average is wrong by more than the quantization.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    random.seed(0)  # the workflow shuffles its clients
    at_clients, at_server = _Apart(), _Apart()
    grid = _Grid(clients, dropped, vector, sample, all_real, at_clients)
    strategy = _Strategy()
    context = _server_context(grid, strategy)
    with ExitStack() as stack:
        # Vectors come to fedtune.secagg quantized: Flower's quantization is timed apart.
        for name in ("parameters_to_ndarrays", "parameters_multiply", "quantize"):
            replaced = at_clients.around(getattr(mod, name))
            stack.enter_context(mock.patch.object(mod, name, replaced))
        for name in ("dequantize", "ndarrays_to_parameters"):
            replaced = at_server.around(getattr(workflow, name))
            stack.enter_context(mock.patch.object(workflow, name, replaced))
        strategy.aggregate_fit = at_server.around(strategy.aggregate_fit)  # type: ignore[method-assign]
        run = workflow.SecAggPlusWorkflow(neighbours + 1, threshold)
        grid.left = time.perf_counter()
        run(grid, context)  # type: ignore[arg-type]
        grid.server.append(time.perf_counter() - grid.left - at_server.seconds)
    if strategy.average is None or grid.plain is None:
        raise SystemExit("Flower: the workflow ended without a result")
    survivors = clients - len(dropped)
    checked = len(grid.real) == survivors
    error = 0.0
    if checked:
        error = float(np.abs(strategy.average - grid.plain / survivors).max() * STEPS / (2 * CLIP))
        if not error < MOST_STEPS:
            raise SystemExit(f"Flower: the average is off by {error:.2f} steps")
    measured = [grid.nodes[place] for place in grid.real]
    return Session(
        client_s=[sum(node.seconds) for node in measured],
        masking_s=[node.seconds[COLLECT] for node in measured],
        server_s=sum(grid.server),
        unmask_s=grid.server[-1],
        bytes_up=max(node.sent for node in measured),
        masks=survivors + len(dropped) * neighbours,
        checked=checked,
        apart_client_s=float(np.median([node.apart for node in measured])),
        apart_server_s=at_server.seconds,
        error_steps=error,
    )


def _server_context(grid: _Grid, strategy: _Strategy) -> LegacyContext:
    """What the workflow finds before a round; the model that it sends out is one number."""
    start = compat.parameters_to_arrayrecord(ndarrays_to_parameters([np.zeros(1)]), False)
    state = RecordDict(
        {
            MAIN_CONFIGS_RECORD: ConfigRecord({WorkflowKey.CURRENT_ROUND: 1}),
            MAIN_PARAMS_RECORD: start,
        }
    )
    proxies = [GridClientProxy(place, grid, 1) for place in grid.nodes]  # type: ignore[arg-type]
    return LegacyContext(
        Context(1, 1, {}, state, {}),
        strategy=strategy,  # type: ignore[arg-type]
        client_manager=_Manager(proxies),  # type: ignore[arg-type]
    )
