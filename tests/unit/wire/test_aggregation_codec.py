"""The messages of secure aggregation as bytes: exact bytes, limits, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from adversary.hostile_bytes import other_spellings, spoiled
from unit.wire.secagg_kinds import ADAPTER, ADVERT, CONTEXT, SECAGG, VALUES

from fedtune.errors import MalformedMessage
from fedtune.secagg.keys import SIGNATURE_BYTES
from fedtune.secagg.messages import (
    SEALED_BYTES,
    Delivery,
    MaskedValues,
    Reveal,
    SealedShares,
    Survivors,
    Unmasking,
)
from fedtune.secagg.session import Session
from fedtune.wire import aggregation
from fedtune.wire.codec import ENVELOPE_LIMIT, MAX_NAME
from fedtune.wire.strict import serialize
from fedtune.wire.v1 import messages_pb2 as pb

MASKED = MaskedValues(VALUES, bytes(SIGNATURE_BYTES))
KINDS = pytest.mark.parametrize("kind", SECAGG)
# As lists, an empty one is a message too: nobody has survived, nothing was shared.
LISTS = ("cohort", "sealed shares", "survivors", "unmasking", "reveal")


@KINDS
def test_what_was_encoded_is_decoded(kind):
    of = SECAGG[kind]
    assert of.decode(of.encode(of.example)) == of.example


@KINDS
def test_other_bytes_for_the_same_message_are_malformed(kind):
    of = SECAGG[kind]
    payload = of.encode(of.example)
    for how, other in {**other_spellings(payload), **spoiled(payload)}.items():
        try:
            found = of.decode(other)
        except MalformedMessage:
            continue
        # A shorter or longer list is another message, and has no bytes but these.
        assert kind in LISTS, f"{how} was taken for {found}"
        assert found != of.example, how
        assert of.encode(found) == other, how


def test_empty_lists():
    assert aggregation.decode_cohort(b"", 3) == ()
    assert aggregation.decode_sealed_shares(b"", 3) == SealedShares(())
    assert aggregation.decode_survivors(b"", 3) == Survivors((), ())
    assert aggregation.decode_unmasking(b"", 3) == Unmasking((), ())
    assert aggregation.decode_reveal(b"", 3) == Reveal((), ())


def test_the_bytes_of_each_kind():
    """Written by hand: field 1 is tag 0a (bytes) or 0a (packed), field 2 is 12, field 3 is 1a."""
    assert aggregation.encode_survivors(Survivors((0, 5, 300), (b"v",))) == bytes.fromhex(
        "0a040005ac02120176"
    )
    assert aggregation.encode_signature(b"ab") == bytes.fromhex("0a02") + b"ab"
    assert aggregation.encode_sealed_shares(SealedShares((b"x", b""))) == bytes.fromhex(
        "0a01780a00"
    )
    assert aggregation.encode_reveal(Reveal((b"x",), (b"y",))) == bytes.fromhex("0a0178120179")
    assert aggregation.encode_unmasking(Unmasking((7,), (b"s",))) == bytes.fromhex("0a0107120173")
    request = aggregation.encode_train_request(b"ad", Delivery((1,), (b"z",)))
    assert request == bytes.fromhex("0a0261641201011a017a")
    assert aggregation.encode_update(MaskedValues(b"v", b"w"), 1.0) == bytes.fromhex(
        "0a017611000000000000f03f1a0177"
    )


@KINDS
def test_every_field_must_be_there(kind):
    if kind in (*LISTS, "envelope"):
        return
    of = SECAGG[kind]
    message = {
        "invite": pb.Invite,
        "advert": pb.Advert,
        "train request": pb.MaskedTrainRequest,
        "update": pb.MaskedUpdate,
        "signature": pb.SurvivorsSignature,
    }[kind]()
    message.ParseFromString(of.encode(of.example))
    for field in message.DESCRIPTOR.fields:
        if field.is_repeated:
            continue
        without = type(message)()
        without.CopyFrom(message)
        without.ClearField(field.name)
        with pytest.raises(MalformedMessage):
            of.decode(serialize(without))


def test_fields_inside_a_list_must_be_there():
    message = pb.Cohort()
    message.ParseFromString(aggregation.encode_cohort((ADVERT, ADVERT)))
    message.adverts[1].ClearField("commitment")
    with pytest.raises(MalformedMessage):
        aggregation.decode_cohort(serialize(message), 3)


@pytest.mark.parametrize("round_number", [0, 1, 2**32 - 1])
def test_contexts_travel_as_they_are(round_number):
    session = Session(replace(CONTEXT, round=round_number), 1, "dd" * 32, bytes(32))
    assert aggregation.decode_invite(aggregation.encode_invite(session)) == session


@pytest.mark.parametrize(
    "field", ["base_digest", "manifest_digest", "config_digest", "adapter_digest", "roster_digest"]
)
@pytest.mark.parametrize("length", [0, 31, 33])
def test_digests_have_their_length(field, length):
    message = pb.Invite()
    message.ParseFromString(SECAGG["invite"].encode(SECAGG["invite"].example))
    owner = message if field in ("adapter_digest", "roster_digest") else message.context
    setattr(owner, field, bytes(length))
    with pytest.raises(MalformedMessage):
        aggregation.decode_invite(serialize(message))


@pytest.mark.parametrize("run_id", ["", "r" * 257])
def test_the_run_has_a_name(run_id):
    message = pb.Invite()
    message.ParseFromString(SECAGG["invite"].encode(SECAGG["invite"].example))
    message.context.run_id = run_id
    with pytest.raises(MalformedMessage):
        aggregation.decode_invite(serialize(message))


def test_attempts_count_from_one():
    session = Session(CONTEXT, 0, "dd" * 32, bytes(32))
    with pytest.raises(MalformedMessage):
        aggregation.decode_invite(aggregation.encode_invite(session))


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -float("inf"), -1e-300])
def test_seconds_are_a_time(seconds):
    with pytest.raises(MalformedMessage):
        aggregation.decode_update(aggregation.encode_update(MASKED, seconds), len(VALUES))


@pytest.mark.parametrize("more", [-1, 1, 8])
def test_vectors_have_exactly_their_length(more):
    wrong = MaskedValues(bytes(len(VALUES) + more), bytes(64))
    with pytest.raises(MalformedMessage):
        aggregation.decode_update(aggregation.encode_update(wrong, 1.0), len(VALUES))
    body = aggregation.encode_train_request(bytes(len(ADAPTER) + more), Delivery((), ()))
    with pytest.raises(MalformedMessage):
        aggregation.decode_train_request(body, len(ADAPTER), 3)


@pytest.mark.parametrize("clients", [3, 4, 50, 1000])
def test_the_largest_honest_message_is_within_its_limit(clients):
    """A cohort of `clients`, with names as long as a greeting may have them."""
    name = "\U0001f3e5" * MAX_NAME
    advert = replace(ADVERT, client=name)
    places = tuple(range(clients))
    assert aggregation.decode_advert(aggregation.encode_advert(advert)) == advert
    cohort = (advert,) * clients
    assert aggregation.decode_cohort(aggregation.encode_cohort(cohort), clients) == cohort
    shares = SealedShares((bytes(SEALED_BYTES),) * (clients - 1))
    body = aggregation.encode_sealed_shares(shares)
    assert aggregation.decode_sealed_shares(body, clients) == shares
    delivery = Delivery(places, shares.sealed)
    body = aggregation.encode_train_request(ADAPTER, delivery)
    assert aggregation.decode_train_request(body, len(ADAPTER), clients) == (ADAPTER, delivery)
    survivors = Survivors(places, (bytes(SIGNATURE_BYTES),) * clients)
    body = aggregation.encode_survivors(survivors)
    assert aggregation.decode_survivors(body, clients) == survivors
    unmasking = Unmasking(places, (bytes(SIGNATURE_BYTES),) * clients)
    body = aggregation.encode_unmasking(unmasking)
    assert aggregation.decode_unmasking(body, clients) == unmasking
    for split in (0, clients // 2, clients):
        reveal = Reveal((bytes(33),) * split, (bytes(33),) * (clients - split))
        assert aggregation.decode_reveal(aggregation.encode_reveal(reveal), clients) == reveal
    run_id = "\U0001f3e5" * MAX_NAME
    session = Session(
        replace(CONTEXT, run_id=run_id, round=2**32 - 1), 2**32 - 1, "dd" * 32, bytes(32)
    )
    assert aggregation.decode_invite(aggregation.encode_invite(session)) == session


def test_lists_far_beyond_the_roster_are_refused_before_they_are_read():
    many = 100_000
    for body, decode in (
        (aggregation.encode_survivors(Survivors((1,) * many, ())), aggregation.decode_survivors),
        (aggregation.encode_cohort((ADVERT,) * 1000), aggregation.decode_cohort),
        (
            aggregation.encode_sealed_shares(SealedShares((b"",) * many)),
            aggregation.decode_sealed_shares,
        ),
        (aggregation.encode_unmasking(Unmasking((1,) * many, ())), aggregation.decode_unmasking),
        (aggregation.encode_reveal(Reveal((b"",) * many, ())), aggregation.decode_reveal),
    ):
        with pytest.raises(MalformedMessage):
            decode(body, 5)
    long = replace(ADVERT, client="n" * 2000)
    with pytest.raises(MalformedMessage):
        aggregation.decode_advert(aggregation.encode_advert(long))
    with pytest.raises(MalformedMessage):
        aggregation.decode_signature(aggregation.encode_signature(bytes(500)))
    session = Session(replace(CONTEXT, run_id="r" * ENVELOPE_LIMIT), 1, "dd" * 32, bytes(32))
    with pytest.raises(MalformedMessage):
        aggregation.decode_invite(aggregation.encode_invite(session))


def test_text_that_is_not_utf_8_is_malformed():
    body = aggregation.encode_advert(replace(ADVERT, client="ab"))
    with pytest.raises(MalformedMessage):
        aggregation.decode_advert(body.replace(b"ab", b"\xff\xfe"))
