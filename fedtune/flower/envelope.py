"""fedtune's payload inside a Flower message.

The payload is one array of bytes: Flower sends large arrays in chunks, and never looks inside.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, Error, Message, MessageType, RecordDict

from fedtune.errors import MalformedMessage

RECORD = "fedtune"
_KEY = "payload"
_STYPE = "fedtune.v1"

# Flower's type of the messages of secure aggregation that ask for no training.
CONVERSATION = f"{MessageType.QUERY}.secagg"
# Flower's type of the message that says that the run is over; its payload says how it went.
FAREWELL = f"{MessageType.QUERY}.over"

# Codes of `flwr.app.Error` that a client of ours gives; Flower's own are below 100.
CLIENT_FAILED = 101
CLIENT_REFUSED = 102
CLIENT_GONE = 103  # said in its place by the server's end of the network


def wrap(payload: bytes) -> RecordDict:
    """The content of a Flower message that carries `payload`."""
    return RecordDict({RECORD: record_of(payload)})


def record_of(payload: bytes) -> ArrayRecord:
    """`payload` as Flower's record of arrays."""
    array = Array(dtype="uint8", shape=(len(payload),), stype=_STYPE, data=payload)
    return ArrayRecord({_KEY: array})


def unwrap(message: Message) -> bytes:
    """The payload of a message; raises `MalformedMessage` if it carries none."""
    # Not by `array_records`: what that gives keeps itself alive, and the payload with it, until
    # the garbage collector comes by.
    record = message.content.get(RECORD) if message.has_content() else None
    array = record.get(_KEY) if isinstance(record, ArrayRecord) else None
    if array is None or array.stype != _STYPE:
        raise MalformedMessage("a Flower message without a fedtune payload")
    return array.data


def reply(message: Message, payload: bytes) -> Message:
    """The answer to `message`."""
    return Message(wrap(payload), reply_to=message)


def failure(message: Message, code: int, reason: str) -> Message:
    """The answer to `message` that says why there is none."""
    return Message(Error(code=code, reason=reason), reply_to=message)
