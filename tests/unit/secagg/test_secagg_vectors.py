"""Secure aggregation against committed known answers, and against input to be refused."""

import json
import runpy
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from vectors import simple_secagg as simple

from fedtune import errors
from fedtune.secagg import shamir
from fedtune.secagg.client import ClientSession, Stage, pairwise_seed
from fedtune.secagg.keys import SERVER, Identity, Roster, RoundKey, seal, unseal
from fedtune.secagg.masks import add_mask
from fedtune.secagg.messages import (
    Advert,
    Delivery,
    MaskedValues,
    Reveal,
    SealedShares,
    Survivors,
    Unmasking,
    cohort_digest,
    commitment_to,
    survivors_signed,
)
from fedtune.secagg.ring import Ring
from fedtune.secagg.server import Aggregation
from fedtune.secagg.session import Session, Terms
from fedtune.secagg.transcript import digest, transcript
from fedtune.types import RoundContext

FOLDER = Path(__file__).parents[2] / "vectors"
VECTORS = json.loads((FOLDER / "secagg_v1.json").read_text("utf-8"))
SESSION = VECTORS["session"]
CLIENTS = SESSION["clients"]
NAMES = [client["name"] for client in CLIENTS]
TERMS = Terms()
RING = Ring(SESSION["bits"])
SHARERS = tuple(SESSION["sharers"])
SURVIVORS = tuple(SESSION["survivors"])
BINDING = bytes.fromhex(SESSION["cohort_digest"])
ROSTER = Roster({name: bytes.fromhex(key) for name, key in SESSION["roster"].items()})
ABOUT = Session(
    RoundContext(SESSION["run_id"], SESSION["round"], *SESSION["digests"][:3]),
    SESSION["attempt"],
    SESSION["digests"][3],
    ROSTER.digest,
)


def advert_of(fields):
    rest = {key: bytes.fromhex(text) for key, text in fields.items() if key != "client"}
    return Advert(fields["client"], **rest)


COHORT = tuple(advert_of(fields) for fields in SESSION["adverts"])


def identity(name):
    return Identity(name, bytes.fromhex(SESSION["identities"][name]))


def unhex(texts):
    return tuple(bytes.fromhex(text) for text in texts)


def shared(place):
    """The client at `place` just after it sealed its shares."""
    client = CLIENTS[place]
    secret = {name: bytes.fromhex(text) for name, text in client["secret"].items()}
    return ClientSession(
        Stage.SHARED,
        client["name"],
        ABOUT.digest,
        RoundKey(secret["sealing"]),
        RoundKey(secret["masking"]),
        secret["self_mask"],
        COHORT,
        bytes.fromhex(client["shares"][place]),
    )


def delivery(place):
    sealed = [
        bytes.fromhex(client["sealed"][place - (place > sender)])
        for sender, client in enumerate(CLIENTS)
        if sender != place
    ]
    return Delivery(SHARERS, tuple(sealed))


def masked_of(client):
    return MaskedValues(*unhex((client["packed"], client["voucher"])))


SURVIVED = Survivors(SURVIVORS, unhex(CLIENTS[place]["voucher"] for place in SURVIVORS))


def unmasking():
    return Unmasking(SURVIVORS, unhex(CLIENTS[place]["survivors_signature"] for place in SURVIVORS))


def test_the_committed_vectors_are_what_the_script_makes():
    assert runpy.run_path(str(FOLDER / "make_secagg_v1.py"))["document"]() == VECTORS


def test_the_simple_implementation_is_that_of_the_rfcs():
    x = VECTORS["x25519"]
    assert simple.x25519_public(bytes.fromhex(x["private"])).hex() == x["public"]
    assert simple.x25519_public(bytes.fromhex(x["other_private"])).hex() == x["other_public"]
    for own, other in (("private", "other_public"), ("other_private", "public")):
        assert simple.x25519(*unhex((x[own], x[other]))).hex() == x["shared"]
    for row in VECTORS["ed25519"]:
        private, message = unhex((row["private"], row["message"]))
        assert simple.ed25519_public(private).hex() == row["public"]
        assert simple.ed25519_sign(private, message).hex() == row["signature"]
    # RFC 5869, appendix A.1, the first block; it cannot depend on the length asked for.
    salt, info = bytes(range(13)), bytes(range(0xF0, 0xFA))
    assert simple.hkdf(b"\x0b" * 22, salt, info).hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
    )


@pytest.mark.parametrize("row", VECTORS["transcripts"])
def test_transcripts(row):
    fields = unhex(row["fields"])
    assert transcript(row["label"], fields).hex() == row["transcript"]
    assert digest(row["label"], fields).hex() == row["digest"]


def test_no_two_transcripts_are_the_same():
    assert len({row["transcript"] for row in VECTORS["transcripts"]}) == len(VECTORS["transcripts"])


@pytest.mark.parametrize("sides", [("private", "other_public"), ("other_private", "public")])
def test_x25519(sides):
    x = VECTORS["x25519"]
    own, other = unhex(x[side] for side in sides)
    expected = simple.hkdf(bytes.fromhex(x["shared"]), BINDING, transcript("test", [b"a", b"b"]))
    assert RoundKey(own).secret_with(other, "test", BINDING, "a", "b") == expected
    assert RoundKey(unhex([x["private"]])[0]).public_key.hex() == x["public"]


@pytest.mark.parametrize("row", VECTORS["ed25519"])
def test_ed25519(row):
    private, public, message, signature = unhex(
        row[key] for key in ("private", "public", "message", "signature")
    )
    signer = Identity("a", private)
    assert signer.public_key == public
    assert signer.sign(message) == signature
    roster = Roster({SERVER: bytes(32), "a": public})
    roster.verify("a", message, signature)
    for name, text in ((SERVER, message), ("a", message + b"\0"), ("b", message)):
        with pytest.raises(errors.BadSignature):
            roster.verify(name, text, signature)


@pytest.mark.parametrize(("seed", "block"), VECTORS["aes_of_zero"].items())
def test_a_mask_begins_with_aes_of_zero(seed, block):
    vector = np.zeros(4, "<u4")
    add_mask(vector, bytes.fromhex(seed))
    assert vector.tobytes().hex() == block


@pytest.mark.parametrize("row", VECTORS["masks"])
def test_masks(row):
    ring = Ring(row["bits"])
    vector = np.zeros(len(row["words"]), ring.dtype)
    add_mask(vector, bytes.fromhex(row["seed"]))
    assert ring.reduce(vector).tolist() == row["words"]


@pytest.mark.parametrize("row", VECTORS["packings"])
def test_packings(row):
    ring = Ring(row["bits"])
    packed = bytes.fromhex(row["packed"])
    assert ring.pack(np.array(row["words"], ring.dtype)) == packed
    assert ring.unpack(packed, len(row["words"])).tolist() == row["words"]


def test_digests_of_roster_session_and_cohort():
    assert ROSTER.digest.hex() == SESSION["roster_digest"]
    assert ABOUT.digest.hex() == SESSION["digest"]
    assert cohort_digest(ABOUT.digest, COHORT) == BINDING
    assert survivors_signed(BINDING, SHARERS, SURVIVORS).hex() == SESSION["survivors_signed"]


@pytest.mark.parametrize("place", SHARERS)
def test_adverts(place):
    advert, secret = COHORT[place], CLIENTS[place]["secret"]
    sealing, masking, seed = unhex(secret[key] for key in ("sealing", "masking", "self_mask"))
    assert RoundKey(sealing).public_key == advert.sealing_key
    assert RoundKey(masking).public_key == advert.masking_key
    assert commitment_to(seed) == advert.commitment
    assert identity(advert.client).public_key == ROSTER.keys[advert.client]
    assert identity(advert.client).sign(advert.signed(ABOUT.digest)) == advert.signature


@pytest.mark.parametrize("place", SHARERS)
def test_shares_of_a_fixed_polynomial(place):
    client = CLIENTS[place]
    pairs = unhex(client["shares"])
    assert TERMS.threshold_of(4) == SESSION["threshold"] == 3
    for key, half in (("masking", slice(33)), ("self_mask", slice(33, 66))):
        coefficients = client["polynomials"][key]
        for point, pair in enumerate(pairs, 1):
            value = shamir._evaluate(coefficients[::-1], point)
            assert value.to_bytes(33, "little") == pair[half]
        for points in combinations(range(1, 5), 3):
            shares = {point: pairs[point - 1][half] for point in points}
            assert shamir.combine(shares, shamir.weights(points)).hex() == client["secret"][key]


@pytest.mark.parametrize("place", SHARERS)
def test_sealed_shares_and_seeds_of_pairwise_masks(place):
    state, client = shared(place), CLIENTS[place]
    others = [other for other in SHARERS if other != place]
    for other, expected in zip(others, unhex(client["sealed"]), strict=True):
        receiver = COHORT[other]
        key, associated = state._seal_of(client["name"], receiver.client, receiver.sealing_key)
        pair = bytes.fromhex(client["shares"][other])
        assert seal(key, pair, associated) == expected
        assert unseal(key, expected, associated) == pair
        seed = pairwise_seed(state.masking, COHORT, state.binding, place, other)
        assert seed.hex() == client["pairwise_seeds"][other]
        assert seed.hex() == CLIENTS[other]["pairwise_seeds"][place]


@pytest.mark.parametrize("place", SHARERS)
def test_a_client_says_just_these_bytes(place):
    client = CLIENTS[place]
    state = shared(place).accept(delivery(place), TERMS)
    assert state.shares == unhex(sender["shares"][place] for sender in CLIENTS)
    own = identity(client["name"])
    state, masked = state.mask(np.array(client["values"]), RING, own, TERMS)
    assert masked == masked_of(client)
    if place in SURVIVORS:
        state, signature = state.sign(SURVIVED, own, ROSTER, TERMS)
        assert signature.hex() == client["survivors_signature"]
        reveal = state.reveal(unmasking(), ROSTER, TERMS)[1]
        assert reveal == Reveal(*(unhex(shares) for shares in client["reveal"].values()))


def server_after_values():
    server = Aggregation(ABOUT.digest, ROSTER, TERMS, len(SESSION["sum"]))
    for name, advert in zip(NAMES, COHORT, strict=True):
        server.receive_advert(name, advert)
    assert server.close_adverts() == COHORT
    for client in CLIENTS:
        server.receive_shares(client["name"], SealedShares(unhex(client["sealed"])))
    assert server.close_shares() == {name: delivery(place) for place, name in enumerate(NAMES)}
    assert server.expect(RING) == len(CLIENTS[0]["packed"]) // 2
    return server


def test_a_server_adds_up_just_this_sum():
    server = server_after_values()
    survivors = [CLIENTS[place] for place in SURVIVORS]
    for client in survivors:
        server.receive_values(client["name"], masked_of(client))
    assert server.close_values().survivors == SURVIVED
    for client in survivors:
        server.receive_signature(client["name"], bytes.fromhex(client["survivors_signature"]))
    assert server.close_signatures() == unmasking()
    for client in survivors:
        shares = (unhex(part) for part in client["reveal"].values())
        server.receive_reveal(client["name"], Reveal(*shares))
    assert server.close_reveals().tolist() == SESSION["sum"]


# --- Input to be refused, by the step that takes it


def take_public_key(value):
    RoundKey(bytes(32)).secret_with(bytes.fromhex(value), "test", BINDING, "a", "b")


def take_advert(value):
    """At the server and at a client, which must agree on the error."""
    advert = advert_of(value)
    server = Aggregation(ABOUT.digest, ROSTER, TERMS, 5)
    with pytest.raises(errors.WireError) as at_server:
        server.receive_advert(advert.client, advert)
    state = ClientSession(
        Stage.ADVERTISED,
        NAMES[2],
        ABOUT.digest,
        RoundKey(bytes(32)),
        RoundKey(bytes(32)),
        bytes(32),
        COHORT[2:3],
    )
    others = (*COHORT[2:],) if advert.client != NAMES[0] else COHORT[1:]
    with pytest.raises(type(at_server.value)):
        state.share((advert, *others), ROSTER, TERMS)
    raise at_server.value


def take_share(value):
    """Sealed by one client for another, and revealed to the server."""
    share = bytes.fromhex(value)
    state, receiver = shared(2), COHORT[0]
    key, associated = state._seal_of(state.name, receiver.client, receiver.sealing_key)
    for pair in (share + bytes(33), bytes(33) + share):
        genuine = delivery(0)
        sealed = (genuine.sealed[0], seal(key, pair, associated), genuine.sealed[2])
        with pytest.raises(errors.MalformedMessage):
            shared(0).accept(Delivery(SHARERS, sealed), TERMS)
    server = server_after_values()
    for place in SURVIVORS:
        server.receive_values(NAMES[place], masked_of(CLIENTS[place]))
    server.close_values()
    for place in SURVIVORS:
        signature = bytes.fromhex(CLIENTS[place]["survivors_signature"])
        server.receive_signature(NAMES[place], signature)
    server.close_signatures()
    server.receive_reveal(NAMES[0], Reveal((share,) * 3, (share,)))


def take_packed(value):
    masked = replace(masked_of(CLIENTS[0]), packed=bytes.fromhex(value))
    server_after_values().receive_values(NAMES[0], masked)


def take_sealed(value):
    genuine = delivery(0)
    sealed = (genuine.sealed[0], bytes.fromhex(value), genuine.sealed[2])
    shared(0).accept(Delivery(SHARERS, sealed), TERMS)


TAKE = {
    "public key": take_public_key,
    "advert": take_advert,
    "share": take_share,
    "packed": take_packed,
    "sealed": take_sealed,
}


@pytest.mark.parametrize("row", VECTORS["bad"], ids=lambda row: row["name"])
def test_bad_vector_is_refused_with_the_error_it_names(row):
    expected = getattr(errors, row["error"])
    with pytest.raises(expected) as caught:
        TAKE[row["what"]](row["value"])
    assert type(caught.value) is expected
