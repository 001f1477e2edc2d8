"""An in-process `Grid`: Flower's messages to clients on this machine, without Ray."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from functools import partial

from fedtune.flower import internals

from flwr.app import Context, Error, Message, RecordDict  # isort: skip
from flwr.clientapp import ClientApp  # isort: skip
from flwr.serverapp import Grid  # isort: skip
from flwr.supercore.run import Run  # isort: skip

from fedtune.flower.envelope import CLIENT_FAILED
from fedtune.flower.pool import Failed, Handler, Pool, Task

KIND = "message"
FIRST_NODE = 2  # 1 is the server
RUN_ID = 1


def message_handler(app: ClientApp, clients: int, wire: bool = False) -> Handler:
    """What a worker does with a message: find the node's context, run the app, answer.

    With `wire`, both directions go through Flower's network format.
    """

    def handle(data: bytes) -> bytes:
        message = internals.message_from_bytes(data)
        if wire:
            message = internals.through_network_format(message)
        node = message.metadata.dst_node_id
        internals.become_task(RUN_ID, node)
        context = Context(
            run_id=RUN_ID,
            node_id=node,
            node_config={"partition-id": node - FIRST_NODE, "num-partitions": clients},
            state=RecordDict(),
            run_config={},
        )
        answer = app(message, context)
        if wire:
            answer = internals.through_network_format(answer)
        return internals.message_to_bytes(answer)

    return handle


class LocalGrid(Grid):
    """Carries messages to `clients` nodes whose app runs in the workers of `pool`.

    A timeout counts per client from the moment it starts: clients that wait for a free core
    would not wait in a deployment.
    """

    def __init__(self, pool: Pool, clients: int) -> None:
        self._pool = pool
        self._clients = clients
        self._run = Run.create_empty(RUN_ID)
        self._queued: dict[str, Message] = {}
        internals.become_task(RUN_ID, internals.SERVER_NODE)

    def set_run(self, run: Run) -> None:
        """See `Grid.set_run`."""
        self._run = run

    @property
    def run(self) -> Run:
        """See `Grid.run`."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """See `Grid.create_message`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes are there from the start."""
        return range(FIRST_NODE, FIRST_NODE + self._clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; they are worked on when they are pulled."""
        ids = []
        for message in messages:
            message_id = str(uuid.uuid4())
            internals.set_message_id(message, message_id)
            self._queued[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers to queued messages, as they come."""
        queued = [self._queued.pop(i) for i in message_ids if i in self._queued]
        return self.send_and_receive(queued)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Answers in order of completion, each as soon as it is there.

        A client that dies or does not answer in time gives an error message.
        """
        sent = list(messages)
        for message in sent:
            internals.set_message_id(message, str(uuid.uuid4()))
        tasks = [
            Task(place, KIND, partial(internals.message_to_bytes, message))
            for place, message in enumerate(sent)
        ]
        for place, result in self._pool.run(tasks, timeout):
            if isinstance(result, Failed):
                internals.become_task(RUN_ID, sent[place].metadata.dst_node_id)
                answer = Message(Error(CLIENT_FAILED, result.reason), reply_to=sent[place])
            else:
                answer = internals.message_from_bytes(result)
            # A client's app may have run in this process; what is sent next is the server's.
            internals.become_task(RUN_ID, internals.SERVER_NODE)
            yield answer
