"""Protobuf, read strictly: a size limit before parsing, every field there, none unknown."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from fedtune.errors import MalformedMessage

WIRE_VERSION = 1

ProtoMessage = TypeVar("ProtoMessage", bound=Message)


def serialize(message: Message) -> bytes:
    """The bytes of a message, the same on every machine."""
    return message.SerializeToString(deterministic=True)


def parse(kind: type[ProtoMessage], payload: bytes, limit: int) -> ProtoMessage:
    """A message of `kind`; raises `MalformedMessage`.

    The bytes must be the very ones that `serialize` gives, so that no two payloads mean the same.
    """
    name = kind.DESCRIPTOR.name
    if len(payload) > limit:
        raise MalformedMessage(f"{name} of {len(payload)} bytes is over the limit of {limit}")
    message = kind()
    try:
        message.ParseFromString(payload)
    except DecodeError as error:
        raise MalformedMessage(f"not a {name}: {error}") from error
    _check(message, name)
    version = getattr(message, "wire_version", WIRE_VERSION)
    if version != WIRE_VERSION:
        raise MalformedMessage(
            f"{name} has wire version {version}, this side speaks {WIRE_VERSION}; "
            "install the same fedtune on both sides"
        )
    if serialize(message) != payload:
        raise MalformedMessage(f"{name} is not in its one canonical form")
    return message


def _check(message: Message, name: str) -> None:
    # A field that this kind does not know means that the payload is not what it is taken for.
    if len(UnknownFieldSet(message)):
        raise MalformedMessage(f"{name} has fields that wire version {WIRE_VERSION} lacks")
    # An `optional` field is the only one of a oneof of its own, whose name begins so.
    choices = [one for one in message.DESCRIPTOR.oneofs if not one.name.startswith("_")]
    for choice in choices:
        if message.WhichOneof(choice.name) is None:
            raise MalformedMessage(f"{name} has none of {', '.join(f.name for f in choice.fields)}")
    for field in message.DESCRIPTOR.fields:
        if not field.is_repeated and not message.HasField(field.name):
            if field.containing_oneof in choices:
                continue
            raise MalformedMessage(f"{name} has no {field.name}")
        if field.type == field.TYPE_MESSAGE:
            value = getattr(message, field.name)
            for part in value if field.is_repeated else [value]:
                _check(part, field.message_type.name)
