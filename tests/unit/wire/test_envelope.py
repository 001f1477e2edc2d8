"""Signed envelopes: what is under the signature, and who may open what."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedtune.errors import (
    BadSignature,
    ContextMismatch,
    MalformedMessage,
    ProtocolViolation,
)
from fedtune.secagg.keys import SERVER, Identity, Roster
from fedtune.wire.envelope import OVERHEAD, Envelope, Kind, read_envelope, seal_envelope
from fedtune.wire.strict import serialize
from fedtune.wire.v1 import messages_pb2 as pb

ALICE, BOB, CAROL = (
    Identity(name, bytes([place]) * 32) for place, name in enumerate(("a", "b", SERVER), 1)
)
ROSTER = Roster({who.name: who.public_key for who in (ALICE, BOB, CAROL)})
SESSION = bytes(range(32))
BODY = b"a body"
SEALED = seal_envelope(ALICE, Kind.UPDATE, SESSION, BODY)


def _read(payload: bytes = SEALED) -> Envelope:
    return read_envelope(payload, 100)


def _transcript(kind: int, sender: bytes, session: bytes, body: bytes) -> bytes:
    """What docs/protocol.md says is signed, written again: fields behind their lengths."""
    label = b"fedtune v1 envelope"
    fields = [label, kind.to_bytes(8, "little"), sender, session, sha256(body).digest()]
    return b"".join(len(field).to_bytes(8, "little") + field for field in fields)


def test_what_was_sealed_is_what_is_opened():
    for kind in Kind:
        for who in (ALICE, BOB, CAROL):
            for body in (b"", BODY, bytes(100)):
                envelope = _read(seal_envelope(who, kind, SESSION, body))
                assert (envelope.kind, envelope.sender, envelope.session) == (
                    kind,
                    who.name,
                    SESSION,
                )
                assert envelope.open(ROSTER, who.name, SESSION, (kind,)) == body
                assert envelope.open(ROSTER, who.name, SESSION, list(Kind)) == body


def test_the_signature_is_over_kind_sender_session_and_body():
    envelope = _read()
    signed = _transcript(6, b"a", SESSION, BODY)
    key = Ed25519PublicKey.from_public_bytes(ALICE.public_key)
    key.verify(envelope.signature, signed)
    for other in (
        _transcript(5, b"a", SESSION, BODY),
        _transcript(6, b"b", SESSION, BODY),
        _transcript(6, b"a", bytes(32), BODY),
        _transcript(6, b"a", SESSION, BODY + b"\0"),
    ):
        with pytest.raises(InvalidSignature):
            key.verify(envelope.signature, other)


def test_the_same_message_has_the_same_bytes():
    assert seal_envelope(ALICE, Kind.UPDATE, SESSION, BODY) == SEALED


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"kind": Kind.ADVERT}, ProtocolViolation),
        ({"sender": "b"}, ProtocolViolation),
        ({"sender": SERVER}, ProtocolViolation),
        ({"sender": "nobody"}, ProtocolViolation),
        ({"session": bytes(32)}, ContextMismatch),
        ({"body": b"a bodY"}, BadSignature),
        ({"body": b""}, BadSignature),
        ({"body": BODY + b"\0"}, BadSignature),
        ({"signature": bytes(64)}, BadSignature),
        ({"signature": b"\xff" * 64}, BadSignature),
    ],
)
def test_nothing_can_be_changed(changes, error):
    with pytest.raises(error):
        replace(_read(), **changes).open(ROSTER, "a", SESSION, (Kind.UPDATE,))


@pytest.mark.parametrize(
    ("sender", "session", "kinds", "error"),
    [
        ("a", SESSION, (), ProtocolViolation),
        ("a", SESSION, (Kind.ADVERT, Kind.REVEAL), ProtocolViolation),
        ("b", SESSION, (Kind.UPDATE,), ProtocolViolation),
        (SERVER, SESSION, (Kind.UPDATE,), ProtocolViolation),
        ("a", bytes(32), (Kind.UPDATE,), ContextMismatch),
    ],
)
def test_it_is_opened_as_what_it_is(sender, session, kinds, error):
    with pytest.raises(error):
        _read().open(ROSTER, sender, session, kinds)


def test_only_the_key_in_the_roster_counts():
    stranger = Identity("a", bytes([9]) * 32)
    payload = seal_envelope(stranger, Kind.UPDATE, SESSION, BODY)
    with pytest.raises(BadSignature):
        _read(payload).open(ROSTER, "a", SESSION, (Kind.UPDATE,))
    other = Roster({SERVER: CAROL.public_key, "b": BOB.public_key})
    with pytest.raises(BadSignature):
        _read().open(other, "a", SESSION, (Kind.UPDATE,))
    posing = seal_envelope(replace(BOB, name="a"), Kind.UPDATE, SESSION, BODY)
    with pytest.raises(BadSignature):
        _read(posing).open(ROSTER, "a", SESSION, (Kind.UPDATE,))


def _raw(**changes: object) -> bytes:
    fields = {
        "wire_version": 1,
        "kind": 6,
        "sender": "a",
        "session": SESSION,
        "body": BODY,
        "signature": bytes(64),
    }
    merged = {**fields, **changes}
    return serialize(pb.Envelope(**{k: v for k, v in merged.items() if v is not None}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {name: None}
            for name in ("wire_version", "kind", "sender", "session", "body", "signature")
        ),
        {"wire_version": 0},
        {"wire_version": 2},
        {"kind": 0},
        {"kind": 11},
        {"kind": 2**32 - 1},
        {"session": bytes(31)},
        {"session": bytes(33)},
        {"session": b""},
        {"signature": bytes(63)},
        {"signature": bytes(65)},
        {"signature": b""},
    ],
)
def test_what_is_no_envelope(changes):
    assert _read(_raw()).body == BODY
    with pytest.raises(MalformedMessage):
        _read(_raw(**changes))


def test_the_limit_is_that_of_the_body():
    for limit in (0, 1, 5000):
        read_envelope(seal_envelope(ALICE, Kind.UPDATE, SESSION, bytes(limit)), limit)
        with pytest.raises(MalformedMessage):
            read_envelope(
                seal_envelope(ALICE, Kind.UPDATE, SESSION, bytes(limit + OVERHEAD)), limit
            )


@pytest.mark.parametrize("name", ["n" * 256, "ü" * 256, "病" * 256, "\U0001f3e5" * 256])
@pytest.mark.parametrize("limit", [0, 5000])
def test_the_longest_name_fits_into_the_overhead(name, limit):
    """As long as a greeting may have it: 256 printable characters."""
    payload = seal_envelope(Identity(name, bytes(32)), Kind.ADVERT, SESSION, bytes(limit))
    assert read_envelope(payload, limit).sender == name


def test_kinds_keep_their_numbers():
    """They are on the wire: a new kind goes behind the last."""
    assert [(kind.name, int(kind)) for kind in Kind] == [
        ("INVITE", 1),
        ("ADVERT", 2),
        ("COHORT", 3),
        ("SEALED_SHARES", 4),
        ("TRAIN_REQUEST", 5),
        ("UPDATE", 6),
        ("SURVIVORS", 7),
        ("SIGNATURE", 8),
        ("UNMASKING", 9),
        ("REVEAL", 10),
    ]
