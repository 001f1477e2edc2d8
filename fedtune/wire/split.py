"""What travels between a client and the server of its base model: typed messages to bytes and back.

As in `codec`, decoding is strict and bounded: by the size of a message before it is parsed, then by
what both sides know of each other. What embeddings, outputs and gradients hold is judged by who
decodes their encoding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import MalformedMessage
from fedtune.secagg.keys import SIGNATURE_BYTES
from fedtune.secagg.transcript import DIGEST_BYTES
from fedtune.types import digest_of
from fedtune.wire.codec import MAX_NAME
from fedtune.wire.strict import WIRE_VERSION, parse, serialize
from fedtune.wire.v1 import split_pb2 as pb

NONCE_BYTES = 32
# All of a message but its arrays; an introduction has a name of four bytes per character.
REST_BYTES = 4 * MAX_NAME + 512
_NUMBERS = np.dtype("<u4")
_LARGEST = 2**32 - 1

Int64Array = NDArray[np.int64]
Part = TypeVar("Part")


class Kind(IntEnum):
    """What a request asks for; `OPEN` for outputs, and then for the gradient of what follows.

    `ACTIVATIONS` are outputs too, of examples to train on.
    """

    DIFFERENTIATE = 1
    OUTPUTS = 2
    OPEN = 3
    ACTIVATIONS = 4


class Reason(IntEnum):
    """Why a request is not answered. The first four pass; asked again, it may be."""

    BUSY = 1
    LATE = 2
    FORGOTTEN = 3
    STOPPING = 4
    NOT_FINITE = 5
    FAILED = 6

    @property
    def passes(self) -> bool:
        """Whether asking again can help."""
        return self <= Reason.STOPPING


@dataclass(frozen=True)
class Terms:
    """What both sides must agree on before anything is sent; digests are SHA-256 in hexadecimal."""

    federation: str
    base: str
    answers: str  # of the answers' first tokens
    width: int
    answer_count: int
    encoding: str
    rungs: int = 0  # states of an example; 0: the outputs are scores

    @classmethod
    def of(
        cls,
        federation: str,
        base: str,
        tokens: Int64Array,
        width: int,
        encoding: str,
        rungs: int = 0,
    ) -> Terms:
        """With the answers' first tokens, int64 `[answers]`, in their order."""
        answers = digest_of(tokens.tolist())
        return cls(federation, base, answers, width, len(tokens), encoding, rungs)

    @property
    def output_values(self) -> int:
        """Values of a state, or scores of an example."""
        return self.width if self.rungs else self.answer_count

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over all of it, 32 bytes."""
        return bytes.fromhex(digest_of([getattr(self, name) for name in _TERMS]))


_TERMS = ("federation", "base", "answers", "width", "answer_count", "encoding", "rungs")


@dataclass(frozen=True)
class Description:
    """What a server works on, and how much of it at a time."""

    terms: Terms
    examples: int  # most of a request
    tokens: int  # most of an example
    message_bytes: int  # most of a message


@dataclass(frozen=True)
class Introduction:
    """Who is there, and under which roster and terms it signs."""

    name: str
    roster_digest: bytes
    terms_digest: bytes
    signature: bytes


@dataclass(frozen=True)
class Request:
    """Encoded embeddings of examples; `lengths` and `labels` are int64 `[n]`.

    `labels` is empty unless `kind` is `DIFFERENTIATE`; `patience` is in ms.
    """

    number: int
    kind: Kind
    patience: int
    lengths: Int64Array = field(repr=False)
    labels: Int64Array = field(repr=False)
    embeddings: bytes = field(repr=False)


@dataclass(frozen=True)
class Upstream:
    """The encoded gradient of a loss by the outputs of the request `number`."""

    number: int
    patience: int
    gradient: bytes = field(repr=False)


@dataclass(frozen=True)
class Challenge:
    """What is to be signed."""

    nonce: bytes


@dataclass(frozen=True)
class Welcome:
    """The client is let in."""


@dataclass(frozen=True)
class Answer:
    """Losses (float32) or encoded outputs, and encoded gradients, of a request."""

    number: int
    values: bytes = field(repr=False)
    gradient: bytes = field(repr=False)


@dataclass(frozen=True)
class Refusal:
    """The request `number` is not answered."""

    number: int
    reason: Reason


FromClient = Introduction | Request | Upstream
FromServer = Challenge | Welcome | Answer | Refusal


def encode_describe_request() -> bytes:
    """Serialize the question what a server works on."""
    return serialize(pb.DescribeRequest(wire_version=WIRE_VERSION))


def check_describe_request(payload: bytes) -> None:
    """Raise `MalformedMessage` unless this is that question, in this wire version."""
    parse(pb.DescribeRequest, payload, REST_BYTES)


def encode_description(description: Description) -> bytes:
    """Serialize what a server works on."""
    terms = description.terms
    return serialize(
        pb.Description(
            wire_version=WIRE_VERSION,
            federation_digest=bytes.fromhex(terms.federation),
            base_digest=bytes.fromhex(terms.base),
            answers_digest=bytes.fromhex(terms.answers),
            width=terms.width,
            answers=terms.answer_count,
            encoding=terms.encoding,
            examples=description.examples,
            tokens=description.tokens,
            message_bytes=description.message_bytes,
            rungs=terms.rungs,
        )
    )


def decode_description(payload: bytes) -> Description:
    """Parse it; raises `MalformedMessage`."""
    message = parse(pb.Description, payload, REST_BYTES)
    digests = (message.federation_digest, message.base_digest, message.answers_digest)
    if any(len(digest) != DIGEST_BYTES for digest in digests):
        raise MalformedMessage("a digest in the description is not 32 bytes long")
    if not message.encoding.isascii() or not message.encoding.isalnum():
        raise MalformedMessage("the description's encoding is no name")
    federation, base, answers = (digest.hex() for digest in digests)
    sizes = (message.width, message.answers)
    terms = Terms(federation, base, answers, *sizes, message.encoding, message.rungs)
    return Description(terms, message.examples, message.tokens, message.message_bytes)


def encode_from_client(said: FromClient) -> bytes:
    """Serialize what a client says on its stream."""
    if isinstance(said, Introduction):
        introduction = pb.Introduction(
            name=said.name,
            roster_digest=said.roster_digest,
            terms_digest=said.terms_digest,
            signature=said.signature,
        )
        return serialize(pb.FromClient(introduction=introduction))
    if isinstance(said, Upstream):
        upstream = pb.Upstream(number=said.number, patience=said.patience, gradient=said.gradient)
        return serialize(pb.FromClient(upstream=upstream))
    request = pb.Request(
        number=said.number,
        kind=said.kind,
        patience=said.patience,
        lengths=said.lengths.astype(_NUMBERS).tobytes(),
        labels=said.labels.astype(_NUMBERS).tobytes(),
        embeddings=said.embeddings,
    )
    return serialize(pb.FromClient(request=request))


def decode_from_client(payload: bytes, here: Description) -> FromClient:
    """Parse what a client says to the server that is described so; raises `MalformedMessage`."""
    message = parse(pb.FromClient, payload, here.message_bytes)
    if message.HasField("introduction"):
        return _introduction(message.introduction)
    if message.HasField("upstream"):
        upstream = message.upstream
        return Upstream(_number(upstream.number), upstream.patience, upstream.gradient)
    request = message.request
    try:
        kind = Kind(request.kind)
    except ValueError as error:
        raise MalformedMessage(f"a request of the unknown kind {request.kind}") from error
    if kind == (Kind.DIFFERENTIATE if here.terms.rungs else Kind.ACTIVATIONS):
        raise MalformedMessage(f"a request of kind {kind}, with {here.terms.rungs} rungs")
    lengths = _numbers(request.lengths, "lengths")
    if not 0 < len(lengths) <= here.examples:
        raise MalformedMessage(f"{len(lengths)} examples in a request, not 1 to {here.examples}")
    if lengths.min() < 1 or lengths.max() > here.tokens:
        raise MalformedMessage(f"an example must have 1 to {here.tokens} tokens")
    labels = _numbers(request.labels, "labels")
    if len(labels) != (len(lengths) if kind == Kind.DIFFERENTIATE else 0):
        raise MalformedMessage(f"{len(labels)} labels for {len(lengths)} examples of this kind")
    if len(labels) and labels.max() >= here.terms.answer_count:
        raise MalformedMessage(f"a label is beyond the {here.terms.answer_count} answers")
    return Request(
        _number(request.number), kind, request.patience, lengths, labels, request.embeddings
    )


def encode_from_server(said: FromServer) -> bytes:
    """Serialize what the server says on a stream."""
    if isinstance(said, Challenge):
        return serialize(pb.FromServer(challenge=pb.Challenge(nonce=said.nonce)))
    if isinstance(said, Welcome):
        return serialize(pb.FromServer(welcome=pb.Welcome()))
    if isinstance(said, Refusal):
        refusal = pb.Refusal(number=said.number, reason=said.reason)
        return serialize(pb.FromServer(refusal=refusal))
    answer = pb.Answer(number=said.number, values=said.values, gradient=said.gradient)
    return serialize(pb.FromServer(answer=answer))


def decode_from_server(payload: bytes, limit: int) -> FromServer:
    """Parse what a server says, of at most `limit` bytes; raises `MalformedMessage`."""
    message = parse(pb.FromServer, payload, limit)
    if message.HasField("challenge"):
        if len(message.challenge.nonce) != NONCE_BYTES:
            raise MalformedMessage(f"a challenge must be {NONCE_BYTES} bytes long")
        return Challenge(message.challenge.nonce)
    if message.HasField("welcome"):
        return Welcome()
    if message.HasField("refusal"):
        try:
            reason = Reason(message.refusal.reason)
        except ValueError as error:
            raise MalformedMessage(
                f"a refusal for the unknown reason {message.refusal.reason}"
            ) from error
        return Refusal(_number(message.refusal.number), reason)
    answer = message.answer
    return Answer(_number(answer.number), answer.values, answer.gradient)


def _introduction(message: pb.Introduction) -> Introduction:
    if not 0 < len(message.name) <= MAX_NAME or not message.name.isprintable():
        raise MalformedMessage("a client's name must be 1 to 256 printable characters")
    if {len(message.roster_digest), len(message.terms_digest)} != {DIGEST_BYTES}:
        raise MalformedMessage("a digest in the introduction is not 32 bytes long")
    if len(message.signature) != SIGNATURE_BYTES:
        raise MalformedMessage(f"a signature must be {SIGNATURE_BYTES} bytes long")
    return Introduction(
        message.name, message.roster_digest, message.terms_digest, message.signature
    )


def _number(value: int) -> int:
    if not 0 < value <= _LARGEST:
        raise MalformedMessage(f"requests are numbered from 1 to {_LARGEST}, this is {value}")
    return value


def _numbers(data: bytes, what: str) -> Int64Array:
    if len(data) % _NUMBERS.itemsize:
        raise MalformedMessage(f"{what} of {len(data)} bytes are no whole numbers")
    return np.frombuffer(data, _NUMBERS).astype(np.int64)
