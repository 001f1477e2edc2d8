"""Every message of secure aggregation by name: an example, how to encode and decode it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedtune.secagg.keys import Identity
from fedtune.secagg.messages import (
    Advert,
    Delivery,
    MaskedValues,
    Reveal,
    SealedShares,
    Survivors,
    Unmasking,
)
from fedtune.secagg.session import Session
from fedtune.types import RoundContext
from fedtune.wire import aggregation, codec
from fedtune.wire.envelope import Envelope, Kind, read_envelope, seal_envelope
from fedtune.wire.strict import serialize
from fedtune.wire.v1 import messages_pb2 as pb

CLIENTS = 7
ADAPTER = bytes(range(40))
VALUES = bytes(range(90))
CONTEXT = RoundContext("run", 3, "aa" * 32, "bb" * 32, "cc" * 32)
ADVERT = Advert("clinic-é", b"s" * 32, b"m" * 32, b"c" * 32, b"g" * 64)


@dataclass(frozen=True)
class Codec:
    """`decode` gives what `encode` takes."""

    example: Any
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


def _encode_envelope(envelope: Envelope) -> bytes:
    return serialize(
        pb.Envelope(
            wire_version=1,
            kind=envelope.kind,
            sender=envelope.sender,
            session=envelope.session,
            body=envelope.body,
            signature=envelope.signature,
        )
    )


SECAGG: dict[str, Codec] = {
    "invite": Codec(
        Session(CONTEXT, 2, "dd" * 32, b"r" * 32),
        aggregation.encode_invite,
        aggregation.decode_invite,
    ),
    "advert": Codec(ADVERT, aggregation.encode_advert, aggregation.decode_advert),
    "cohort": Codec(
        (ADVERT, Advert("", b"", b"", b"", b""), ADVERT),
        aggregation.encode_cohort,
        lambda body: aggregation.decode_cohort(body, CLIENTS),
    ),
    "sealed shares": Codec(
        SealedShares((b"x" * 82, b"", b"y" * 82)),
        aggregation.encode_sealed_shares,
        lambda body: aggregation.decode_sealed_shares(body, CLIENTS),
    ),
    "train request": Codec(
        (ADAPTER, Delivery((0, 2, 300, 2**32 - 1), (b"x" * 82, b""))),
        lambda value: aggregation.encode_train_request(*value),
        lambda body: aggregation.decode_train_request(body, len(ADAPTER), CLIENTS),
    ),
    "update": Codec(
        (MaskedValues(VALUES, b"v" * 64), 1.25),
        lambda value: aggregation.encode_update(*value),
        lambda body: aggregation.decode_update(body, len(VALUES)),
    ),
    "survivors": Codec(
        Survivors((0, 1, 5, 2**32 - 1), (b"v" * 64, b"", b"w" * 64, b"x")),
        aggregation.encode_survivors,
        lambda body: aggregation.decode_survivors(body, CLIENTS),
    ),
    "signature": Codec(b"s" * 64, aggregation.encode_signature, aggregation.decode_signature),
    "unmasking": Codec(
        Unmasking((0, 4), (b"s" * 64, b"t" * 64)),
        aggregation.encode_unmasking,
        lambda body: aggregation.decode_unmasking(body, CLIENTS),
    ),
    "reveal": Codec(
        Reveal((b"x" * 33, b"y" * 33), (b"z" * 33,)),
        aggregation.encode_reveal,
        lambda body: aggregation.decode_reveal(body, CLIENTS),
    ),
    "envelope": Codec(
        read_envelope(seal_envelope(Identity("a", b"k" * 32), Kind.REVEAL, bytes(32), b"b"), 999),
        _encode_envelope,
        lambda payload: read_envelope(payload, 999),
    ),
}
PLAIN: dict[str, Codec] = {
    "hello request": Codec("run", codec.encode_hello_request, codec.decode_hello_request),
    "hello": Codec(codec.Hello(CONTEXT, "clinic", 7, 0), codec.encode_hello, codec.decode_hello),
    "plain train request": Codec(
        codec.TrainRequest(CONTEXT, ADAPTER),
        codec.encode_train_request,
        lambda payload: codec.decode_train_request(payload, len(ADAPTER)),
    ),
    "train reply": Codec(
        codec.TrainReply(CONTEXT, VALUES, 7, 0.5, 1.5),
        codec.encode_train_reply,
        lambda payload: codec.decode_train_reply(payload, len(VALUES)),
    ),
    "evaluate request": Codec(
        codec.EvaluateRequest(CONTEXT, ADAPTER),
        codec.encode_evaluate_request,
        lambda payload: codec.decode_evaluate_request(payload, len(ADAPTER)),
    ),
    "evaluate reply": Codec(
        codec.EvaluateReply(CONTEXT, 9, 4, 3.5),
        codec.encode_evaluate_reply,
        codec.decode_evaluate_reply,
    ),
}
ALL = {**SECAGG, **PLAIN}
