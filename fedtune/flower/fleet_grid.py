"""The server's end of the network: a `Grid` whose answers come one at a time, as they arrive."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fedtune.flower import internals
from fedtune.flower.envelope import CLIENT_GONE
from fedtune.flower.runtime import RuntimeGrid, is_unavailable

from flwr.app import Error, Message  # isort: skip

SHORTEST_WAIT, LONGEST_WAIT = 0.02, 0.1
LOOK_SECONDS = 1.0  # between two looks at who is connected
GONE_SECONDS = 60.0  # disconnected for so long, a client is not waited for
NEVER = ""
GRACE_SECONDS = 60.0  # by which a message outlives the wait for its answer


@dataclass
class _Sent:
    """A message without an answer; `activation` is when its client last connected."""

    message: Message
    activation: str
    missing_since: float = 0.0


class FleetGrid(RuntimeGrid):
    """Flower's grid over HTTP, which also sends again what a client lost when it was killed."""

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Answers in order of arrival; whoever is disconnected for long gives an error.

        When a client connects anew its request is sent once more: the site knows whether it has
        answered, and says the same again.
        """
        deadline = time.monotonic() + (timeout or float("inf"))
        online = self.activations()
        waiting: dict[str, _Sent] = {}
        for message in messages:
            self._send(message, timeout, online, waiting)
        absent: list[_Sent] = []
        wait, looked = SHORTEST_WAIT, time.monotonic()
        while (waiting or absent) and time.monotonic() < deadline:
            answered = False
            for answer in self.pull_messages(list(waiting)) if waiting else ():
                sent = waiting.pop(answer.metadata.reply_to_message_id, None)
                if sent is None:
                    continue
                answered = True
                if is_unavailable(answer):
                    absent.append(_Sent(sent.message, NEVER, time.monotonic()))
                else:
                    yield answer
            wait = SHORTEST_WAIT if answered else min(LONGEST_WAIT, wait * 1.5)
            time.sleep(wait)
            if time.monotonic() - looked > LOOK_SECONDS:
                looked = time.monotonic()
                online = self.activations()
                for message_id, sent in list(waiting.items()):
                    now = online.get(sent.message.metadata.dst_node_id)
                    if now is not None and now != sent.activation:
                        del waiting[message_id]
                        self._send(_copy(sent.message), timeout, online, waiting)
                for sent in list(absent):
                    if sent.message.metadata.dst_node_id in online:
                        absent.remove(sent)
                        self._send(_copy(sent.message), timeout, online, waiting)
                    elif time.monotonic() - sent.missing_since > GONE_SECONDS:
                        absent.remove(sent)
                        yield _gone(sent.message)

    def _send(
        self,
        message: Message,
        timeout: float | None,
        online: dict[int, str],
        waiting: dict[str, _Sent],
    ) -> None:
        if timeout is not None:
            message.metadata.ttl = timeout + GRACE_SECONDS
        [message_id] = self.push_messages([message])
        waiting[message_id] = _Sent(message, online.get(message.metadata.dst_node_id, NEVER))


def _copy(message: Message) -> Message:
    metadata = message.metadata
    return Message(
        message.content, metadata.dst_node_id, metadata.message_type, group_id=metadata.group_id
    )


def _gone(message: Message) -> Message:
    own = (message.metadata.run_id, internals.SERVER_NODE)
    internals.become_task(own[0], message.metadata.dst_node_id)
    answer = Message(Error(CLIENT_GONE, "disconnected"), reply_to=message)
    internals.become_task(*own)
    return answer
