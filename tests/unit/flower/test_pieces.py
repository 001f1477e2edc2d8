"""Messages in pieces, as another side might send them that lies about what they are."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from flwr.app import Message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_object_id, iterate_object_tree

from fedtune.errors import ServerRefused
from fedtune.flower import internals
from fedtune.flower.envelope import unwrap, wrap
from fedtune.flower.pieces import PIECE, parts_of, whole

SIZE = 2 * PIECE + 1000  # three pieces
LARGEST = 4 * PIECE


@dataclass
class Sender:
    """What another side has of one message: its head, its tree, and the content of each object."""

    head: Message
    tree: ObjectTree
    contents: dict[str, bytes]  # what an object consists of stands before itself
    asked: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, payload: bytes) -> Sender:
        internals.become_task(7, internals.SERVER_NODE)
        message = Message(wrap(payload), 5, "train", group_id="1")
        internals.set_message_id(message, message.object_id)
        head, tree, objects = parts_of(message)
        return cls(head, tree, {name: item.deflate() for name, item in objects.items()})

    def names(self, kind: str) -> list[str]:
        """The objects of a kind, each named by the SHA-256 of its content."""
        return [
            name for name, text in self.contents.items() if text.split(b" ")[0] == kind.encode()
        ]

    def received(self, largest: int = LARGEST) -> bytes:
        def pull(name: str) -> bytes:
            self.asked.append(name)
            return self.contents[name]

        return unwrap(whole(self.head, self.tree, pull, largest, 0.0, lambda _done, _total: None))

    def replace(self, name: str, content: bytes) -> None:
        """Send another object, and name it in all that consist of it: every hash is right."""
        names = {name: get_object_id(content)}
        changed = {}
        for old, text in self.contents.items():
            new = content if old == name else text
            for before, after in names.items():
                new = new.replace(before.encode(), after.encode()) if len(new) < 10_000 else new
            names[old] = get_object_id(new)
            changed[names[old]] = new
        self.contents = changed
        internals.set_message_id(self.head, names[self.head.metadata.message_id])
        for part in iterate_object_tree(self.tree):
            part.object_id = names[part.object_id]

    def claim(self, **claims: object) -> None:
        """Say of the payload's array what `claims` say."""
        [name] = self.names("Array")
        head, _, body = self.contents[name].partition(b"\x00")
        said = json.dumps(json.loads(body) | claims).encode()
        kind, children, _ = head.split(b" ")
        self.replace(name, b"%s %s %d\x00%s" % (kind, children, len(said), said))


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("kind", ["ArrayChunk", "Array", "ArrayRecord", "RecordDict", "Message"])
@pytest.mark.parametrize("change", [flip, lambda content: content[:-1], lambda content: b""])
def test_what_does_not_have_the_hash_that_it_is_named_by_is_refused(
    kind: str, change: Callable[[bytes], bytes]
) -> None:
    """Of whatever object: one bit, the last byte, or all of it."""
    payload = os.urandom(SIZE)
    sender = Sender.of(payload)
    assert sender.received() == payload
    *_, victim = sender.names(kind)
    whole_content = sender.contents[victim]
    sender.contents[victim] = change(whole_content)
    with pytest.raises(ServerRefused, match="not the one that was asked for"):
        sender.received()
    assert sender.asked[-1] == victim
    sender.contents[victim] = whole_content
    assert sender.received() == payload


def test_two_pieces_cannot_change_places() -> None:
    """Each is genuine, and comes under the name of the other."""
    sender = Sender.of(os.urandom(SIZE))
    first, second, _ = sender.names("ArrayChunk")
    contents = sender.contents
    contents[first], contents[second] = contents[second], contents[first]
    with pytest.raises(ServerRefused, match="not the one that was asked for"):
        sender.received()


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1, 2 * PIECE, 3 * PIECE, 1, 0])
def test_pieces_that_do_not_add_up_to_the_size_that_was_said_are_refused(size: int) -> None:
    """Under a hash that is right: it is the sender who says two things."""
    sender = Sender.of(os.urandom(SIZE))
    sender.claim(shape=[size])
    with pytest.raises(ServerRefused, match=f"an array of {size} bytes whose pieces have {SIZE}"):
        sender.received()


@pytest.mark.parametrize("named", [[0, 1], [0, 1, 2, 2], [0, 0, 1, 2]])
def test_pieces_that_are_left_out_or_named_again_do_not_add_up(named: list[int]) -> None:
    sender = Sender.of(os.urandom(SIZE))
    sender.claim(arraychunk_ids=named)
    with pytest.raises(ServerRefused):
        sender.received()


@pytest.mark.parametrize("size", [3 * PIECE + 1, 1 << 33, 1 << 62])
def test_a_size_that_the_pieces_cannot_have_takes_no_memory(size: int) -> None:
    """It is refused for what it says: no piece is asked for, and no buffer made."""
    sender = Sender.of(os.urandom(SIZE))
    sender.claim(shape=[size])
    assert taken(sender) < PIECE / 10
    assert not set(sender.asked) & set(sender.names("ArrayChunk"))


def test_one_piece_that_is_named_many_times_takes_no_memory() -> None:
    """Its size adds up: a gigabyte of the same 5 MiB."""
    sender = Sender.of(os.urandom(PIECE))
    sender.claim(shape=[200 * PIECE], arraychunk_ids=[0] * 200)
    assert taken(sender) < PIECE / 10
    assert sum(len(content) for content in sender.contents.values()) < PIECE + 10_000
    assert not set(sender.asked) & set(sender.names("ArrayChunk"))


def test_more_pieces_than_the_largest_message_has_are_not_fetched() -> None:
    sender = Sender.of(os.urandom(20 * PIECE))
    assert taken(sender, largest=PIECE) < PIECE / 10
    assert sender.asked == []


def test_a_piece_that_is_larger_than_a_piece_is_refused() -> None:
    """Whatever the size that was said: it would be in memory beside the array."""
    sender = Sender.of(os.urandom(SIZE))
    sender.replace(sender.names("ArrayChunk")[0], b"ArrayChunk  9\x00" + os.urandom(PIECE + 100))
    sender.claim(shape=[SIZE + 100])
    with pytest.raises(ServerRefused, match="a piece of an array is none"):
        sender.received()


@pytest.mark.parametrize("kind", [b"Array", b"ArrayChunks", b"ArrayRecord", b""])
def test_a_piece_must_be_one(kind: bytes) -> None:
    sender = Sender.of(os.urandom(SIZE))
    *_, last = sender.names("ArrayChunk")
    sender.replace(last, kind + b"  1000\x00" + bytes(1000))
    with pytest.raises(ServerRefused, match="a piece of an array is none"):
        sender.received()


def taken(sender: Sender, largest: int = LARGEST) -> int:
    """Bytes at most in use while a message was refused."""
    tracemalloc.start()
    try:
        with pytest.raises(ServerRefused, match="pieces"):
            sender.received(largest)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
