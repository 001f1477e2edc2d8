"""Signed envelopes: who says what, of which kind, in which session."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from hashlib import sha256

from fedtune.errors import ContextMismatch, MalformedMessage, ProtocolViolation
from fedtune.secagg.keys import SIGNATURE_BYTES, Identity, Roster
from fedtune.secagg.transcript import DIGEST_BYTES, number, transcript
from fedtune.wire.codec import MAX_NAME
from fedtune.wire.strict import WIRE_VERSION, parse, serialize
from fedtune.wire.v1 import messages_pb2 as pb

# At most this much more than the body: a name of the longest kind, four bytes per character.
OVERHEAD = 4 * MAX_NAME + 256


class Kind(IntEnum):
    """What a body is; part of what is signed, so that no message passes for another."""

    INVITE = 1
    ADVERT = 2
    COHORT = 3
    SEALED_SHARES = 4
    TRAIN_REQUEST = 5
    UPDATE = 6
    SURVIVORS = 7
    SIGNATURE = 8
    UNMASKING = 9
    REVEAL = 10


@dataclass(frozen=True)
class Envelope:
    """An envelope whose signature is not verified yet."""

    kind: Kind
    sender: str
    session: bytes
    body: bytes
    signature: bytes

    def open(self, roster: Roster, sender: str, session: bytes, kinds: Iterable[Kind]) -> bytes:
        """The body; raises `WireError` unless kind, sender, session and signature are right."""
        if self.kind not in kinds:
            raise ProtocolViolation(f"a message of kind {self.kind.name.lower()} at this point")
        if self.sender != sender:
            raise ProtocolViolation(f"a message of {self.sender!r} in the name of {sender!r}")
        if self.session != session:
            raise ContextMismatch(
                "a message of another session: of another round or attempt, or the other side has "
                "another adapter, base model, configuration or roster"
            )
        roster.verify(sender, _signed(self.kind, sender, session, self.body), self.signature)
        return self.body


def seal_envelope(identity: Identity, kind: Kind, session: bytes, body: bytes) -> bytes:
    """`body` signed by `identity` and serialized."""
    return serialize(
        pb.Envelope(
            wire_version=WIRE_VERSION,
            kind=kind,
            sender=identity.name,
            session=session,
            body=body,
            signature=identity.sign(_signed(kind, identity.name, session, body)),
        )
    )


def read_envelope(payload: bytes, body_limit: int) -> Envelope:
    """An envelope with a body of at most `body_limit` bytes; raises `MalformedMessage`."""
    message = parse(pb.Envelope, payload, body_limit + OVERHEAD)
    if len(message.session) != DIGEST_BYTES or len(message.signature) != SIGNATURE_BYTES:
        raise MalformedMessage("session or signature of an envelope are of a wrong length")
    try:
        kind = Kind(message.kind)
    except ValueError as error:
        raise MalformedMessage(f"an envelope of the unknown kind {message.kind}") from error
    return Envelope(kind, message.sender, message.session, message.body, message.signature)


def _signed(kind: Kind, sender: str, session: bytes, body: bytes) -> bytes:
    parts = [number(kind), sender.encode(), session, sha256(body).digest()]
    return transcript("envelope", parts)
