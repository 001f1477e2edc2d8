"""The messages of secure aggregation to bytes and back.

Lengths of keys, seals and shares are checked where they are used (`fedtune.secagg`); here every
list is bounded by the number of clients in the roster before it is parsed.
"""

from __future__ import annotations

from fedtune.errors import MalformedMessage
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
from fedtune.wire.codec import ENVELOPE_LIMIT, MAX_NAME, finite, read_context, write_context
from fedtune.wire.strict import parse, serialize
from fedtune.wire.v1 import messages_pb2 as pb

# Upper bounds of one client's part of a list, tags and lengths of protobuf included.
_ADVERT = 4 * MAX_NAME + 256
_PART = 128
INVITE_LIMIT = ENVELOPE_LIMIT
ADVERT_LIMIT = _ADVERT
SIGNATURE_LIMIT = _PART


def list_limit(clients: int) -> int:
    """Bytes that a list with a part for each of `clients` can have."""
    return 64 + _PART * 2 * clients


def cohort_limit(clients: int) -> int:
    """Bytes that the adverts of `clients` can have."""
    return 64 + (_ADVERT + 16) * clients


def encode_invite(session: Session) -> bytes:
    """An invitation to `session`."""
    return serialize(
        pb.Invite(
            context=write_context(session.context),
            attempt=session.attempt,
            adapter_digest=bytes.fromhex(session.adapter_digest),
            roster_digest=session.roster_digest,
        )
    )


def decode_invite(body: bytes) -> Session:
    """The session that a client is invited to; raises `MalformedMessage`."""
    message = parse(pb.Invite, body, INVITE_LIMIT)
    if len(message.adapter_digest) != 32 or len(message.roster_digest) != 32:
        raise MalformedMessage("a digest in the invitation is not 32 bytes long")
    if not message.attempt:
        raise MalformedMessage("attempts count from 1")
    return Session(
        read_context(message.context),
        message.attempt,
        message.adapter_digest.hex(),
        message.roster_digest,
    )


def encode_advert(advert: Advert) -> bytes:
    """A client's keys."""
    return serialize(_advert(advert))


def decode_advert(body: bytes) -> Advert:
    """A client's keys; raises `MalformedMessage`."""
    return _read_advert(parse(pb.Advert, body, ADVERT_LIMIT))


def encode_cohort(adverts: tuple[Advert, ...]) -> bytes:
    """Everybody's keys."""
    return serialize(pb.Cohort(adverts=[_advert(advert) for advert in adverts]))


def decode_cohort(body: bytes, clients: int) -> tuple[Advert, ...]:
    """Keys of at most `clients` clients; raises `MalformedMessage`."""
    message = parse(pb.Cohort, body, cohort_limit(clients))
    return tuple(_read_advert(advert) for advert in message.adverts)


def encode_sealed_shares(shares: SealedShares) -> bytes:
    """A client's sealed shares."""
    return serialize(pb.SealedShares(sealed=shares.sealed))


def decode_sealed_shares(body: bytes, clients: int) -> SealedShares:
    """A client's sealed shares; raises `MalformedMessage`."""
    return SealedShares(tuple(parse(pb.SealedShares, body, list_limit(clients)).sealed))


def encode_train_request(adapter: bytes, delivery: Delivery) -> bytes:
    """A client's request to train, with the shares that the others sealed for it."""
    return serialize(
        pb.MaskedTrainRequest(adapter=adapter, sharers=delivery.sharers, sealed=delivery.sealed)
    )


def decode_train_request(body: bytes, adapter_bytes: int, clients: int) -> tuple[bytes, Delivery]:
    """Adapter (of exactly `adapter_bytes`) and shares; raises `MalformedMessage`."""
    limit = adapter_bytes + list_limit(clients)
    message = parse(pb.MaskedTrainRequest, body, limit)
    if len(message.adapter) != adapter_bytes:
        raise MalformedMessage(
            f"adapter has {len(message.adapter)} bytes, the manifest says {adapter_bytes}"
        )
    return message.adapter, Delivery(tuple(message.sharers), tuple(message.sealed))


def encode_update(masked: MaskedValues, train_seconds: float) -> bytes:
    """A client's masked values, and how long it trained."""
    return serialize(
        pb.MaskedUpdate(values=masked.packed, voucher=masked.voucher, train_seconds=train_seconds)
    )


def decode_update(body: bytes, values_bytes: int) -> tuple[MaskedValues, float]:
    """Masked values of exactly `values_bytes`, and seconds; raises `MalformedMessage`."""
    message = parse(pb.MaskedUpdate, body, values_bytes + 128)
    if len(message.values) != values_bytes:
        raise MalformedMessage(f"masked values of {len(message.values)} bytes, not {values_bytes}")
    masked = MaskedValues(message.values, message.voucher)
    return masked, finite(message.train_seconds, "train_seconds")


def encode_survivors(survivors: Survivors) -> bytes:
    """Whose updates are in the sum."""
    return serialize(pb.Survivors(places=survivors.places, vouchers=survivors.vouchers))


def decode_survivors(body: bytes, clients: int) -> Survivors:
    """Whose updates are in the sum; raises `MalformedMessage`."""
    message = parse(pb.Survivors, body, list_limit(clients))
    return Survivors(tuple(message.places), tuple(message.vouchers))


def encode_signature(signature: bytes) -> bytes:
    """A client's signature on the survivors."""
    return serialize(pb.SurvivorsSignature(signature=signature))


def decode_signature(body: bytes) -> bytes:
    """A signature; raises `MalformedMessage`."""
    signature: bytes = parse(pb.SurvivorsSignature, body, SIGNATURE_LIMIT).signature
    return signature


def encode_unmasking(unmasking: Unmasking) -> bytes:
    """Who signed, and the signatures."""
    return serialize(pb.Unmasking(signers=unmasking.signers, signatures=unmasking.signatures))


def decode_unmasking(body: bytes, clients: int) -> Unmasking:
    """Who signed, and the signatures; raises `MalformedMessage`."""
    message = parse(pb.Unmasking, body, list_limit(clients))
    return Unmasking(tuple(message.signers), tuple(message.signatures))


def encode_reveal(reveal: Reveal) -> bytes:
    """A client's shares."""
    return serialize(pb.Reveal(self_masks=reveal.self_masks, masking_keys=reveal.masking_keys))


def decode_reveal(body: bytes, clients: int) -> Reveal:
    """A client's shares; raises `MalformedMessage`."""
    message = parse(pb.Reveal, body, list_limit(clients))
    return Reveal(tuple(message.self_masks), tuple(message.masking_keys))


def _advert(advert: Advert) -> pb.Advert:
    return pb.Advert(
        client=advert.client,
        sealing_key=advert.sealing_key,
        masking_key=advert.masking_key,
        commitment=advert.commitment,
        signature=advert.signature,
    )


def _read_advert(message: pb.Advert) -> Advert:
    return Advert(
        message.client,
        message.sealing_key,
        message.masking_key,
        message.commitment,
        message.signature,
    )
