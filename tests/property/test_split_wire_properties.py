"""Any message of a base model's service survives the wire; a choice is made exactly once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import MalformedMessage
from fedtune.wire.split import (
    Answer,
    Challenge,
    Description,
    Introduction,
    Kind,
    Reason,
    Refusal,
    Request,
    Terms,
    Upstream,
    Welcome,
    decode_description,
    decode_from_client,
    decode_from_server,
    encode_description,
    encode_from_client,
    encode_from_server,
)
from fedtune.wire.strict import parse
from fedtune.wire.v1 import split_pb2 as pb

DIGEST = st.binary(min_size=32, max_size=32)
HEX = DIGEST.map(bytes.hex)
SIZE = st.integers(1, 2**32 - 1)
NAME = st.text(st.characters(codec="utf-8"), min_size=1, max_size=256).filter(str.isprintable)
ENCODING = st.sampled_from(["float32", "int8"])
TERMS = st.builds(Terms, HEX, HEX, HEX, SIZE, SIZE, ENCODING, st.integers(0, 2**32 - 1))
HERE = Description(Terms("ab" * 32, "ab" * 32, "ab" * 32, 4, 7, "int8"), 5, 30, 1 << 16)
STATES = replace(HERE, terms=replace(HERE.terms, rungs=3))


@st.composite
def requests(draw: Any, first: Kind = Kind.DIFFERENTIATE) -> Request:
    kind = draw(st.sampled_from([first, Kind.OUTPUTS, Kind.OPEN]))
    lengths = draw(st.lists(st.integers(1, HERE.tokens), min_size=1, max_size=HERE.examples))
    labels = draw(st.lists(st.integers(0, 6), min_size=len(lengths), max_size=len(lengths)))
    asked = labels if kind == Kind.DIFFERENTIATE else []
    arrays = (np.array(lengths, np.int64), np.array(asked, np.int64))
    numbers = (draw(SIZE), kind, draw(st.integers(0, 2**32 - 1)))
    return Request(*numbers, *arrays, draw(st.binary(max_size=99)))


FROM_CLIENT = st.one_of(
    requests(),
    st.builds(Upstream, SIZE, SIZE, st.binary(max_size=99)),
    st.builds(Introduction, NAME, DIGEST, DIGEST, st.binary(min_size=64, max_size=64)),
)
FROM_SERVER = st.one_of(
    st.builds(Challenge, DIGEST),
    st.just(Welcome()),
    st.builds(Answer, SIZE, st.binary(max_size=99), st.binary(max_size=99)),
    st.builds(Refusal, SIZE, st.sampled_from(list(Reason))),
)


def _same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    for name, value in vars(one).items():
        np.testing.assert_array_equal(value, getattr(other, name), name)


@given(FROM_CLIENT)
def test_what_a_client_says(said: Any) -> None:
    _same(decode_from_client(encode_from_client(said), HERE), said)


@given(requests(Kind.ACTIVATIONS))
def test_what_a_client_says_to_who_answers_with_states(said: Request) -> None:
    _same(decode_from_client(encode_from_client(said), STATES), said)


@given(FROM_SERVER)
def test_what_a_server_says(said: Any) -> None:
    _same(decode_from_server(encode_from_server(said), 1 << 16), said)


@given(st.builds(Description, TERMS, SIZE, SIZE, SIZE))
def test_a_description(description: Description) -> None:
    assert decode_description(encode_description(description)) == description


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(payload: bytes) -> None:
    for decode, limit in ((decode_from_client, HERE), (decode_from_server, 1000)):
        try:
            found = decode(payload, limit)
        except MalformedMessage:
            continue
        encode = encode_from_client if decode is decode_from_client else encode_from_server
        assert encode(found) == payload


def test_exactly_one_of_a_choice_is_there() -> None:
    one = pb.FromServer(welcome=pb.Welcome()).SerializeToString()
    other = pb.FromServer(challenge=pb.Challenge(nonce=bytes(32))).SerializeToString()
    for payload in (b"", one + other, other + one):
        with pytest.raises(MalformedMessage):
            parse(pb.FromServer, payload, 1000)
    for payload in (one, other):
        parse(pb.FromServer, payload, 1000)


@given(TERMS, TERMS)
def test_terms_have_one_digest(one: Terms, other: Terms) -> None:
    assert (one.digest == other.digest) == (one == other)
