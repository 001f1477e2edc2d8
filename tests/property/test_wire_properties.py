"""Any message survives the wire; any bytes are a message or are refused."""

from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import MalformedMessage
from fedtune.types import RoundContext
from fedtune.wire import codec

DIGEST = st.binary(min_size=32, max_size=32).map(bytes.hex)
COUNT = st.integers(0, 10**12)
NUMBER = st.floats(0, allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=256)
NAME = TEXT.filter(str.isprintable)
CONTEXT = st.builds(RoundContext, TEXT, st.integers(0, 2**32 - 1), DIGEST, DIGEST, DIGEST)
VECTOR = st.binary(max_size=64)

DECODERS: list[Callable[[bytes], Any]] = [
    codec.decode_hello_request,
    codec.decode_hello,
    lambda payload: codec.decode_train_request(payload, 4),
    lambda payload: codec.decode_train_reply(payload, 4),
    lambda payload: codec.decode_evaluate_request(payload, 4),
    codec.decode_evaluate_reply,
]


@given(st.builds(codec.Hello, CONTEXT, NAME, COUNT, COUNT))
def test_hello(message):
    assert codec.decode_hello(codec.encode_hello(message)) == message


@given(TEXT)
def test_hello_request(run_id):
    assert codec.decode_hello_request(codec.encode_hello_request(run_id)) == run_id


@given(CONTEXT, VECTOR)
def test_requests(context, vector):
    train = codec.TrainRequest(context, vector)
    assert codec.decode_train_request(codec.encode_train_request(train), len(vector)) == train
    evaluate = codec.EvaluateRequest(context, vector)
    payload = codec.encode_evaluate_request(evaluate)
    assert codec.decode_evaluate_request(payload, len(vector)) == evaluate


@given(st.builds(codec.TrainReply, CONTEXT, VECTOR, st.integers(1, 10**12), NUMBER, NUMBER))
def test_train_reply(message):
    payload = codec.encode_train_reply(message)
    assert codec.decode_train_reply(payload, len(message.update)) == message


@given(CONTEXT, COUNT, COUNT, NUMBER)
def test_evaluate_reply(context, one, other, loss_sum):
    message = codec.EvaluateReply(context, max(one, other), min(one, other), loss_sum)
    assert codec.decode_evaluate_reply(codec.encode_evaluate_reply(message)) == message


@given(st.binary(max_size=300), st.sampled_from(DECODERS))
def test_any_bytes_are_refused_with_the_right_error(payload, decode):
    try:
        decode(payload)
    except MalformedMessage:
        return


@given(
    st.builds(codec.TrainReply, CONTEXT, st.just(b"\0" * 4), st.just(3), NUMBER, NUMBER), st.data()
)
def test_a_flipped_byte_is_refused_or_gives_plausible_values(message, data):
    payload = bytearray(codec.encode_train_reply(message))
    payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        reply = codec.decode_train_reply(bytes(payload), 4)
    except MalformedMessage:
        return
    assert len(reply.update) == 4
    assert 0 < reply.examples <= 10**12
    assert 0 <= reply.loss < float("inf")
    assert 0 <= reply.train_seconds < float("inf")
    assert len(bytes.fromhex(reply.context.base_digest)) == 32
