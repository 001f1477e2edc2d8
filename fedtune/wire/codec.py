"""Typed messages to bytes and back.

Decoding is strict: the size limit comes before parsing, unknown fields and other wire
versions are refused, digests have their length, vectors have exactly the length that the
receiver expects. What a vector holds is judged by the receiver (`fedtune.round`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedtune.errors import MalformedMessage
from fedtune.types import RoundContext
from fedtune.wire.strict import WIRE_VERSION, parse, serialize
from fedtune.wire.v1 import messages_pb2 as pb

# Everything besides the vector: five digests and ids, a client name, a few numbers.
ENVELOPE_LIMIT = 4096
MAX_NAME = 256
MAX_EXAMPLES = 10**12


@dataclass(frozen=True)
class Hello:
    """A client's greeting: its name and how many examples it holds."""

    context: RoundContext
    client: str
    train_examples: int
    test_examples: int


@dataclass(frozen=True)
class AdapterRequest:
    """A global adapter on its way to a client: little-endian float32 in manifest order."""

    context: RoundContext
    adapter: bytes


class TrainRequest(AdapterRequest):
    """Start local training from this adapter."""


class EvaluateRequest(AdapterRequest):
    """Evaluate this adapter on the client's own test set."""


@dataclass(frozen=True)
class TrainReply:
    """A client's update after the update steps, and what it says of itself."""

    context: RoundContext
    update: bytes
    examples: int
    loss: float
    train_seconds: float


@dataclass(frozen=True)
class EvaluateReply:
    """Counts of one client's test set; `loss_sum` is the sum over examples."""

    context: RoundContext
    examples: int
    correct: int
    loss_sum: float


def encode_hello_request(run_id: str) -> bytes:
    """Serialize the question who a client is."""
    return serialize(pb.HelloRequest(wire_version=WIRE_VERSION, run_id=run_id))


def decode_hello_request(payload: bytes) -> str:
    """The run id of the question; raises `MalformedMessage`."""
    message = parse(pb.HelloRequest, payload, ENVELOPE_LIMIT)
    return _run_id(message.run_id)


def encode_hello(hello: Hello) -> bytes:
    """Serialize a greeting."""
    return serialize(
        pb.Hello(
            wire_version=WIRE_VERSION,
            context=write_context(hello.context),
            client=hello.client,
            train_examples=hello.train_examples,
            test_examples=hello.test_examples,
        )
    )


def decode_hello(payload: bytes) -> Hello:
    """Parse a greeting; raises `MalformedMessage`."""
    message = parse(pb.Hello, payload, ENVELOPE_LIMIT)
    if not 0 < len(message.client) <= MAX_NAME or not message.client.isprintable():
        raise MalformedMessage("a client's name must be 1 to 256 printable characters")
    return Hello(
        read_context(message.context),
        message.client,
        _count(message.train_examples, "train_examples"),
        _count(message.test_examples, "test_examples"),
    )


def encode_train_request(request: TrainRequest) -> bytes:
    """Serialize a request to train."""
    return serialize(
        pb.TrainRequest(
            wire_version=WIRE_VERSION,
            context=write_context(request.context),
            adapter=request.adapter,
        )
    )


def decode_train_request(payload: bytes, vector_bytes: int) -> TrainRequest:
    """Parse a request to train whose adapter must be exactly `vector_bytes` long."""
    message = parse(pb.TrainRequest, payload, ENVELOPE_LIMIT + vector_bytes)
    return TrainRequest(
        read_context(message.context), _vector(message.adapter, vector_bytes, "adapter")
    )


def encode_evaluate_request(request: EvaluateRequest) -> bytes:
    """Serialize a request to evaluate."""
    return serialize(
        pb.EvaluateRequest(
            wire_version=WIRE_VERSION,
            context=write_context(request.context),
            adapter=request.adapter,
        )
    )


def decode_evaluate_request(payload: bytes, vector_bytes: int) -> EvaluateRequest:
    """Parse a request to evaluate whose adapter must be exactly `vector_bytes` long."""
    message = parse(pb.EvaluateRequest, payload, ENVELOPE_LIMIT + vector_bytes)
    return EvaluateRequest(
        read_context(message.context), _vector(message.adapter, vector_bytes, "adapter")
    )


def encode_train_reply(reply: TrainReply) -> bytes:
    """Serialize an update."""
    return serialize(
        pb.TrainReply(
            wire_version=WIRE_VERSION,
            context=write_context(reply.context),
            update=reply.update,
            examples=reply.examples,
            loss=reply.loss,
            train_seconds=reply.train_seconds,
        )
    )


def decode_train_reply(payload: bytes, vector_bytes: int) -> TrainReply:
    """Parse an update that must be exactly `vector_bytes` long; raises `MalformedMessage`."""
    message = parse(pb.TrainReply, payload, ENVELOPE_LIMIT + vector_bytes)
    if message.examples == 0:
        raise MalformedMessage("an update must rest on at least one example")
    return TrainReply(
        read_context(message.context),
        _vector(message.update, vector_bytes, "update"),
        _count(message.examples, "examples"),
        finite(message.loss, "loss"),
        finite(message.train_seconds, "train_seconds"),
    )


def encode_evaluate_reply(reply: EvaluateReply) -> bytes:
    """Serialize evaluation counts."""
    return serialize(
        pb.EvaluateReply(
            wire_version=WIRE_VERSION,
            context=write_context(reply.context),
            examples=reply.examples,
            correct=reply.correct,
            loss_sum=reply.loss_sum,
        )
    )


def decode_evaluate_reply(payload: bytes) -> EvaluateReply:
    """Parse evaluation counts; raises `MalformedMessage`."""
    message = parse(pb.EvaluateReply, payload, ENVELOPE_LIMIT)
    if message.correct > message.examples:
        raise MalformedMessage("more correct answers than examples")
    return EvaluateReply(
        read_context(message.context),
        _count(message.examples, "examples"),
        message.correct,
        finite(message.loss_sum, "loss_sum"),
    )


def write_context(context: RoundContext) -> pb.Context:
    """A context as protobuf."""
    return pb.Context(
        run_id=context.run_id,
        round=context.round,
        base_digest=bytes.fromhex(context.base_digest),
        manifest_digest=bytes.fromhex(context.manifest_digest),
        config_digest=bytes.fromhex(context.config_digest),
    )


def read_context(context: pb.Context) -> RoundContext:
    """A context from protobuf; raises `MalformedMessage`."""
    digests = (context.base_digest, context.manifest_digest, context.config_digest)
    if any(len(digest) != 32 for digest in digests):
        raise MalformedMessage("a digest in the context is not 32 bytes long")
    return RoundContext(
        _run_id(context.run_id), context.round, *(digest.hex() for digest in digests)
    )


def _run_id(text: str) -> str:
    if not 0 < len(text) <= MAX_NAME:
        raise MalformedMessage("the run id must be 1 to 256 characters")
    return text


def _vector(data: bytes, expected: int, name: str) -> bytes:
    if len(data) != expected:
        raise MalformedMessage(f"{name} has {len(data)} bytes, the manifest says {expected}")
    return data


def _count(value: int, name: str) -> int:
    if value > MAX_EXAMPLES:
        raise MalformedMessage(f"{name} = {value} is beyond any plausible count")
    return value


def finite(value: float, name: str) -> float:
    """`value`; raises `MalformedMessage` unless it is finite and at least 0."""
    if not math.isfinite(value) or value < 0:
        raise MalformedMessage(f"{name} = {value} is not a finite number of at least 0")
    return value
