"""How many bytes a client sends and gets in a round, by the codecs that will make them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.config import Config
from fedtune.round.terms import make_quantizer, make_ring, make_terms
from fedtune.secagg.keys import KEY_BYTES, SERVER, SIGNATURE_BYTES, Identity
from fedtune.secagg.messages import (
    SEALED_BYTES,
    Advert,
    Delivery,
    MaskedValues,
    Reveal,
    SealedShares,
    Survivors,
    Unmasking,
)
from fedtune.secagg.session import Session
from fedtune.secagg.shamir import SHARE_BYTES
from fedtune.secagg.transcript import DIGEST_BYTES
from fedtune.types import RoundContext
from fedtune.update import make_pipeline
from fedtune.wire import aggregation, codec
from fedtune.wire.envelope import Kind, seal_envelope

_DIGEST = "00" * DIGEST_BYTES
_CONTEXT = RoundContext("00" * 16, 1, _DIGEST, _DIGEST, _DIGEST)
_SIGNATURE = bytes(SIGNATURE_BYTES)
_SITE_REST = 4 << 20  # bytes of a site's memory besides what it last answered


@dataclass(frozen=True)
class Traffic:
    """Bytes of one client's payloads in one round, without what HTTP and TLS add."""

    up: int
    down: int


def predict_traffic(config: Config, size: int, name: str, names: Sequence[str]) -> Traffic:
    """Of the client `name` of the roster `names`, with an adapter of `size` values.

    All that are asked answer. A round in which the server asks for scores takes another adapter
    down.
    """
    if config.secagg.enabled:
        return _masked(config, size, name, sorted(names))
    adapter, sent = bytes(4 * config.values_trained(size)), config.values_sent(size)
    if config.update.bits is None:
        update = bytes(make_pipeline(config.update, sent).encoded_bytes)
    else:
        quantizer = make_quantizer(config, sent, 1)
        update = bytes(make_ring(quantizer, 1).packed_bytes(quantizer.slots))
    reply = codec.TrainReply(_CONTEXT, update, 1000, 1.0, 1.0)
    request = codec.TrainRequest(_CONTEXT, adapter)
    return Traffic(len(codec.encode_train_reply(reply)), len(codec.encode_train_request(request)))


def site_disk(config: Config, size: int, clients: int) -> int:
    """Bytes of a site's memory: its last answer, the one that replaces it, and SQLite's log."""
    return 3 * packed_update(config, size, clients) + _SITE_REST


def packed_update(config: Config, size: int, clients: int) -> int:
    """Bytes of the values that a client sends, in a federation of `clients`."""
    size = config.values_sent(size)
    if not config.secagg.enabled:
        return size * 4
    cohort = min(config.rounds.clients_per_round or clients, clients)
    quantizer = make_quantizer(config, size, cohort, make_terms(config, clients))
    return make_ring(quantizer, cohort).packed_bytes(quantizer.slots)


def _masked(config: Config, size: int, name: str, names: Sequence[str]) -> Traffic:
    """Five exchanges: keys, sealed shares, values, signature, shares."""
    clients = min(config.rounds.clients_per_round or len(names), len(names))
    # Which of them are drawn is not known; how long their names are makes little difference.
    cohort = [name, *(other for other in names if other != name)][:clients]
    keys = (bytes(KEY_BYTES), bytes(KEY_BYTES), bytes(DIGEST_BYTES), _SIGNATURE)
    adverts = tuple(Advert(client, *keys) for client in cohort)
    places, signatures = tuple(range(clients)), (_SIGNATURE,) * clients
    sealed = (bytes(SEALED_BYTES),) * (clients - 1)
    session = Session(_CONTEXT, 1, _DIGEST, bytes(DIGEST_BYTES))
    values = MaskedValues(bytes(packed_update(config, size, len(names))), _SIGNATURE)
    shares = (bytes(SHARE_BYTES),) * clients
    down = {
        Kind.INVITE: aggregation.encode_invite(session),
        Kind.COHORT: aggregation.encode_cohort(adverts),
        Kind.TRAIN_REQUEST: aggregation.encode_train_request(
            bytes(4 * config.values_trained(size)), Delivery(places, sealed)
        ),
        Kind.SURVIVORS: aggregation.encode_survivors(Survivors(places, signatures)),
        Kind.UNMASKING: aggregation.encode_unmasking(Unmasking(places, signatures)),
    }
    up = {
        Kind.ADVERT: aggregation.encode_advert(adverts[0]),
        Kind.SEALED_SHARES: aggregation.encode_sealed_shares(SealedShares(sealed)),
        Kind.UPDATE: aggregation.encode_update(values, 1.0),
        Kind.SIGNATURE: aggregation.encode_signature(_SIGNATURE),
        Kind.REVEAL: aggregation.encode_reveal(Reveal(shares, ())),
    }
    return Traffic(_enveloped(name, up), _enveloped(SERVER, down))


def _enveloped(sender: str, bodies: dict[Kind, bytes]) -> int:
    """Bytes of these bodies, each in an envelope that is signed by a key of nobody's."""
    identity = Identity(sender, bytes(KEY_BYTES))
    return sum(
        len(seal_envelope(identity, kind, bytes(DIGEST_BYTES), body))
        for kind, body in bodies.items()
    )
