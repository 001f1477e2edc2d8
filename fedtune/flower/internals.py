"""Every use of Flower that is not its public API; `tests/unit/flower` holds it to its contract.

Flower changes its internals often. What breaks with a new version breaks here.
"""

from __future__ import annotations

import logging
import os

# Both are read when Flower is imported: no telemetry, no look for updates.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from flwr.app import Message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE = 1  # Flower's own number for the server's node


def message_to_bytes(message: Message) -> bytes:
    """A message as Flower's protobuf."""
    data: bytes = message_to_proto(message).SerializeToString()
    return data


def message_from_bytes(data: bytes) -> Message:
    """A message from `message_to_bytes`."""
    return message_from_proto(ProtoMessage.FromString(data))


def through_network_format(message: Message) -> Message:
    """The message after Flower's network format: deflated to objects and inflated again."""
    objects = get_all_nested_objects(message)
    contents = {object_id: item.deflate() for object_id, item in objects.items()}
    inflated = inflate_object_from_contents(message.object_id, contents)
    if not isinstance(inflated, Message):
        raise TypeError(f"Flower inflated a {type(inflated).__name__}, not a Message")
    # The id is not part of the object; on the network the SuperLink puts it back.
    set_message_id(inflated, message.metadata.message_id)
    return inflated


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message the id that otherwise the SuperLink gives it."""
    message.metadata.__dict__["_message_id"] = message_id


def become_task(run_id: int, node_id: int) -> None:
    """`Message()` reads whom it is from in these globals, which Flower's runtime sets."""
    TaskIdentity.task_id = run_id
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id


def quiet() -> None:
    """Flower's own log lines only from warnings on: fedtune shows its own progress."""
    logging.getLogger("flwr").setLevel(logging.WARNING)


def take_over_log() -> None:
    """In a process of fedtune's own, Flower's warnings go once and plainly where all others go."""
    quiet()
    logging.getLogger("flwr").handlers.clear()


def is_harmless(record: logging.LogRecord) -> bool:
    """Whether Flower's SuperLink complains of an object that nobody needs.

    The content of a small message goes with its head, and the other side may have taken the
    message, and Flower forgotten it, before its object comes (see `network.push_parts`).
    """
    text = record.getMessage()
    return text.startswith("Failed to store object") and "was not pre-registered" in text
