"""The wire format against committed bytes of another encoder, and against damage."""

import json
import runpy
from pathlib import Path

import pytest
from wire_kinds import DECODE, ENCODE, build

from fedtune.errors import MalformedMessage
from fedtune.types import RoundContext
from fedtune.wire import codec

FOLDER = Path(__file__).parents[2] / "vectors"
VECTORS = json.loads((FOLDER / "wire_v1.json").read_text("utf-8"))
GOOD = {vector["kind"]: vector for vector in VECTORS["good"]}
SIZES = {kind: vector["vector_bytes"] for kind, vector in GOOD.items()}
BYTES = {kind: bytes.fromhex(vector["hex"]) for kind, vector in GOOD.items()}
CONTEXT = RoundContext("run", 1, "aa" * 32, "bb" * 32, "cc" * 32)


def test_the_committed_vectors_are_what_the_script_makes():
    assert runpy.run_path(str(FOLDER / "make_wire_v1.py"))["document"]() == VECTORS


@pytest.mark.parametrize("kind", GOOD)
def test_good_vector_decodes_to_its_values(kind):
    message = DECODE[kind](BYTES[kind], SIZES[kind])
    expected = build(kind, GOOD[kind]["values"])
    assert message == expected
    assert type(message) is type(expected)


@pytest.mark.parametrize("kind", GOOD)
def test_values_encode_to_the_bytes_of_the_good_vector(kind):
    assert ENCODE[kind](build(kind, GOOD[kind]["values"])) == BYTES[kind]


@pytest.mark.parametrize("vector", VECTORS["bad"], ids=lambda vector: vector["name"])
def test_bad_vector_is_refused(vector):
    with pytest.raises(MalformedMessage):
        DECODE[vector["kind"]](bytes.fromhex(vector["hex"]), vector["vector_bytes"])


def _accepted(kind, payload):
    try:
        return DECODE[kind](payload, SIZES[kind])
    except MalformedMessage:
        return None


@pytest.mark.parametrize(
    "kind",
    [
        "hello_request",
        "hello",
        "train_request",
        "train_reply",
        "evaluate_request",
        "evaluate_reply",
    ],
)
def test_no_beginning_of_a_message_is_a_message(kind):
    # All numbers differ from zero, or proto3 would leave them out in the whole message too.
    values = {**GOOD[kind]["values"], **({"test_examples": 3} if kind == "hello" else {})}
    whole = ENCODE[kind](build(kind, values))
    accepted = {cut: _accepted(kind, whole[:cut]) for cut in range(len(whole))}
    assert {cut: message for cut, message in accepted.items() if message is not None} == {}


@pytest.mark.parametrize("kind", ["hello", "train_reply", "evaluate_reply"])
def test_a_cut_message_keeps_its_context_and_vector(kind):
    whole = DECODE[kind](BYTES[kind], SIZES[kind])
    for cut in range(len(BYTES[kind])):
        message = _accepted(kind, BYTES[kind][:cut])
        if message is not None:
            assert message.context == whole.context
            assert getattr(message, "update", None) == getattr(whole, "update", None)
            assert getattr(message, "client", None) == getattr(whole, "client", None)


@pytest.mark.parametrize("kind", GOOD)
def test_one_byte_more_is_refused(kind):
    for byte in range(256):
        with pytest.raises(MalformedMessage):
            DECODE[kind](BYTES[kind] + bytes([byte]), SIZES[kind])


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("tail", ["7801", "7a00", "7d00000000", "7900000000000000f0"])
def test_an_unknown_field_of_any_wire_type_is_refused(kind, tail):
    with pytest.raises(MalformedMessage):
        DECODE[kind](BYTES[kind] + bytes.fromhex(tail), SIZES[kind])


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("version", [0, 2, 2**32 - 1])
def test_another_version_is_refused(kind, version):
    # The last value of a field counts, so a version at the end is the version of the message.
    number = version
    tail = b"\x08"
    while number > 127:
        tail += bytes([number & 127 | 128])
        number >>= 7
    with pytest.raises(MalformedMessage, match="version"):
        DECODE[kind](BYTES[kind] + tail + bytes([number]), SIZES[kind])


@pytest.mark.parametrize(
    ("sent", "taken_for"),
    [
        pytest.param(
            sent,
            taken_for,
        )
        for sent in GOOD
        for taken_for in GOOD
        if sent != taken_for
    ],
)
def test_one_kind_is_refused_as_another(sent, taken_for):
    # Also where the receiver expects the very length that the sender's vector has.
    for size in {SIZES[sent], SIZES[taken_for]}:
        with pytest.raises(MalformedMessage):
            DECODE[taken_for](BYTES[sent], size)


@pytest.mark.parametrize("kind", GOOD)
def test_the_limit_comes_before_parsing(kind):
    with pytest.raises(MalformedMessage, match="limit"):
        DECODE[kind](b"\xff" * (codec.ENVELOPE_LIMIT + SIZES[kind] + 1), SIZES[kind])


@pytest.mark.parametrize("kind", ["train_request", "evaluate_request", "train_reply"])
def test_the_limit_grows_with_the_vector_that_is_expected(kind):
    vector = b"\x3c" * 100_000
    if kind == "train_reply":
        message = codec.TrainReply(CONTEXT, vector, 1, 0.0, 0.0)
    else:
        message = type(DECODE[kind](BYTES[kind], SIZES[kind]))(CONTEXT, vector)
    assert DECODE[kind](ENCODE[kind](message), len(vector)) == message
    for wrong in (0, len(vector) - 1, len(vector) + 1):
        with pytest.raises(MalformedMessage):
            DECODE[kind](ENCODE[kind](message), wrong)


def test_the_longest_names_fit():
    run, client = "\U0001f3e5" * 256, "\U0001f9ec" * 256
    context = RoundContext(run, 2**32 - 1, "aa" * 32, "bb" * 32, "cc" * 32)
    hello = codec.Hello(context, client, 10**12, 10**12)
    assert codec.decode_hello(codec.encode_hello(hello)) == hello
