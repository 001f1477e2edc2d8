"""Flower messages in pieces: bounded, verified, and in memory once.

Flower takes a message apart into objects, and its content into pieces of 5 MiB, each named by its
SHA-256 and sent by a request of its own. Flower's own functions hold all pieces beside the whole;
here a payload of 100 MB takes 100 MB and one piece more, and a piece that does not get through is
tried again, not the message.
"""

from __future__ import annotations

import gc
import io
import json
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import httpx

from fedtune.errors import ServerRefused

from flwr.app import Array, ArrayRecord, Message  # isort: skip
from flwr.app.message import remove_content_from_message  # isort: skip
from flwr.proto.message_pb2 import ObjectTree  # isort: skip
from flwr.supercore.inflatable.inflatable_object import (  # isort: skip
    InflatableObject,
    get_all_nested_objects,
    get_object_body,
    get_object_head_values_from_object_content,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import (  # isort: skip
    ObjectUnavailableError,
    inflatable_class_registry,
)

PIECE = 5 << 20
LARGEST_INLINE = 256 << 10  # bytes of content that go with the head of a message
_LONGEST_HEAD = 64  # bytes of a piece before its content
_OBJECTS = 16  # of a message, besides the pieces of its content
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.25, 5.0

Result = TypeVar("Result")
Tell = Callable[[int, int], None]  # pieces that got through, and all of them


class NotThereYet(Exception):
    """The other side has not yet sent all of a message."""


def parts_of(message: Message) -> tuple[Message, ObjectTree, dict[str, InflatableObject]]:
    """What is sent of a message: its head, the tree of its objects, and the objects.

    The content of a small message goes with its head, and there are no objects.
    """
    records = message.content.values() if message.has_content() else ()
    arrays = [a for record in records if isinstance(record, ArrayRecord) for a in record.values()]
    if sum(len(array.data) for array in arrays) <= LARGEST_INLINE:
        return message, ObjectTree(object_id=message.object_id), {}
    head = remove_content_from_message(message)
    return head, get_object_tree(message), get_all_nested_objects(message)


def send_objects(
    objects: dict[str, InflatableObject],
    missing: set[str],
    push: Callable[[str, bytes], None],
    patience: float,
    tell: Tell,
) -> None:
    """Push the `missing` of a message's objects, what they consist of before themselves."""
    sent = 0
    for object_id, item in objects.items():
        if object_id in missing:
            _patiently(partial(push, object_id, item.deflate()), patience)
            sent += 1
            tell(sent, len(missing))


def whole(
    head: Message,
    tree: ObjectTree,
    pull: Callable[[str], bytes],
    largest: int,
    patience: float,
    tell: Tell,
) -> Message:
    """The message of a head that was pulled, and of its objects if it came without content.

    Raises `NotThereYet`, and `ServerRefused` for one that would have more than about `largest`
    bytes, before it is fetched or put together: pieces can be named many times over.
    """
    if not tree.children:
        return head
    pieces = 1 + largest // PIECE
    named = sum(1 for _ in iterate_object_tree(tree))
    if named > _OBJECTS + pieces:
        raise ServerRefused(f"a message of {named} pieces, when the largest has {pieces}")
    found = _Assembly(pull, pieces, patience, tell).root(head.metadata.message_id)
    if not isinstance(found, Message):
        raise ServerRefused(f"the other side sent a {type(found).__name__}, not a message")
    found.__dict__["_metadata"] = head.metadata
    return found


class _Assembly:
    """One message that is put together."""

    def __init__(
        self, pull: Callable[[str], bytes], pieces: int, patience: float, tell: Tell
    ) -> None:
        self._pull, self._pieces, self._patience, self._tell = pull, pieces, patience, tell
        self._left = _OBJECTS

    def root(self, object_id: str) -> InflatableObject:
        try:
            return self._inflate(object_id, self._fetch(object_id))
        except ObjectUnavailableError as error:
            # What it consists of was sent before itself, so it is not a matter of one piece.
            raise NotThereYet from error

    def _inflate(self, object_id: str, content: bytes) -> InflatableObject:
        self._left -= 1
        if self._left < 0:
            raise ServerRefused(f"a message of more than {_OBJECTS} objects")
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind == Array.__qualname__:
            return self._array(content, children)
        inside = {child: self._inflate(child, self._fetch(child)) for child in children}
        return inflatable_class_registry[kind].inflate(content, inside)

    def _array(self, content: bytes, children: list[str]) -> Array:
        """An array whose pieces go into one buffer as they come."""
        about = json.loads(get_object_body(content, Array))
        named, [size] = about["arraychunk_ids"], about["shape"]
        if len(named) > self._pieces or size > len(named) * PIECE:
            raise ServerRefused(
                f"a message of {len(named)} pieces, when the largest has {self._pieces}"
            )
        buffer = io.BytesIO()
        if size:
            # All of it at once: a buffer that grows is larger than what is in it.
            buffer.seek(size - 1)
            buffer.write(b"\x00")
            buffer.seek(0)
        for done, place in enumerate(named, 1):
            piece = self._fetch(children[place])
            head, body = piece[:_LONGEST_HEAD].partition(b"\x00")[0], memoryview(piece)
            if not head.startswith(b"ArrayChunk ") or len(body) > PIECE + _LONGEST_HEAD:
                raise ServerRefused("a piece of an array is none")
            buffer.write(body[len(head) + 1 :])
            self._tell(done, len(named))
        if buffer.tell() != size:
            raise ServerRefused(f"an array of {size} bytes whose pieces have {buffer.tell()}")
        return Array(about["dtype"], (size,), about["stype"], buffer.getvalue())

    def _fetch(self, object_id: str) -> bytes:
        content = _patiently(partial(self._pull, object_id), self._patience)
        if get_object_id(content) != object_id:
            raise ServerRefused("a piece of a message is not the one that was asked for")
        return content


def _patiently(call: Callable[[], Result], patience: float) -> Result:
    """What `call` returns, tried again for `patience` seconds while the network is broken."""
    deadline = time.monotonic() + patience
    pause = _SHORTEST_PAUSE
    while True:
        try:
            result = call()
        except httpx.TransportError:
            if time.monotonic() + pause > deadline:
                raise
        else:
            # A response of httpx is a cycle with its content: all pieces would stay in memory
            # until the garbage collector finds that there are many.
            gc.collect(1)
            return result
        time.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE)
