"""The server, with two clients in league, lies to a client about others' shares."""

import secrets
from dataclasses import replace

import numpy as np
import pytest
from adversary.federation import SPARSE, Federation, refused, session_of

from fedtune.errors import BadSignature, MalformedMessage, ProtocolViolation
from fedtune.secagg.client import ClientSession, Stage
from fedtune.secagg.keys import seal
from fedtune.secagg.messages import Delivery, SealedShares
from fedtune.secagg.ring import Ring
from fedtune.secagg.shamir import PRIME

VICTIM, OTHER, COLLUDER = "c00", "c01", "c06"
ALL = tuple(range(7))


@pytest.fixture
def federation():
    return Federation().until("begin", "share")


def with_sealed(federation, sender, sealed):
    """A delivery to the victim with one sealed share replaced."""
    genuine = federation.delivery(VICTIM)
    place = federation.names.index(sender) - 1  # the victim is the first
    return replace(genuine, sealed=(*genuine.sealed[:place], sealed, *genuine.sealed[place + 1 :]))


def for_another_receiver(f):
    return with_sealed(f, OTHER, f.sealed_for("c02", OTHER))


def two_senders_swapped(f):
    sealed = f.delivery(VICTIM).sealed
    return Delivery(ALL, (sealed[1], sealed[0], *sealed[2:]))


def the_victims_own_reflected(f):
    return with_sealed(f, OTHER, f.sealed_for(OTHER, VICTIM))


def flipped(bit):
    def a_bit_flipped(f):
        data = bytearray(f.sealed_for(VICTIM, OTHER))
        data[bit // 8] ^= 1 << bit % 8
        return with_sealed(f, OTHER, bytes(data))

    return a_bit_flipped


def cut(f):
    return with_sealed(f, OTHER, f.sealed_for(VICTIM, OTHER)[:-1])


def without_content(f):
    return with_sealed(f, OTHER, b"")


def extended(f):
    return with_sealed(f, OTHER, f.sealed_for(VICTIM, OTHER) + b"\0")


def random_bytes(f):
    return with_sealed(f, OTHER, secrets.token_bytes(82))


def too_few_sharers(f):
    return f.delivery(VICTIM, (0, 1, 2, 3))


def only_itself(f):
    return f.delivery(VICTIM, (0,))


def without_the_victim(f):
    return f.delivery(VICTIM, ALL[1:])


def one_share_missing(f):
    return replace(f.delivery(VICTIM), sealed=f.delivery(VICTIM).sealed[:-1])


def one_share_more(f):
    sealed = f.delivery(VICTIM).sealed
    return Delivery(ALL, (*sealed, sealed[-1]))


def sharers(*places):
    def wrong_places(f):
        return f.delivery(VICTIM, places)

    return wrong_places


def outside_the_cohort(f):
    sealed = f.delivery(VICTIM).sealed
    return Delivery((*ALL, 7), (*sealed, sealed[-1]))


def from_the_colluder(plaintext):
    """A colluder seals for the victim what it likes."""

    def not_a_share(f):
        state = f.state[COLLUDER]
        sealing_key = f.advert[VICTIM].sealing_key
        key, associated = state._seal_of(COLLUDER, VICTIM, sealing_key)
        return with_sealed(f, COLLUDER, seal(key, plaintext, associated))

    return not_a_share


LARGE = PRIME.to_bytes(33, "little")
ATTACKS = [
    (for_another_receiver, BadSignature, "does not open"),
    (two_senders_swapped, BadSignature, "does not open"),
    (the_victims_own_reflected, BadSignature, "does not open"),
    (flipped(0), BadSignature, "does not open"),
    (flipped(33 * 8), BadSignature, "does not open"),
    (flipped(82 * 8 - 1), BadSignature, "does not open"),
    (cut, BadSignature, "does not open"),
    (without_content, BadSignature, "does not open"),
    (extended, BadSignature, "does not open"),
    (random_bytes, BadSignature, "does not open"),
    (too_few_sharers, ProtocolViolation, "4 clients have shared keys, at least 5"),
    (only_itself, ProtocolViolation, "1 clients have shared keys"),
    (without_the_victim, ProtocolViolation, "must be this client"),
    (one_share_missing, ProtocolViolation, "those whose shares came"),
    (one_share_more, ProtocolViolation, "those whose shares came"),
    (sharers(0, 2, 1, 3, 4, 5), MalformedMessage, "ascending"),
    (sharers(0, 1, 1, 2, 3, 4), MalformedMessage, "ascending"),
    (sharers(-6, -5, -4, -3, -2, -1, 0), MalformedMessage, "places of the cohort"),
    (sharers(-1, 0, 1, 2, 3), MalformedMessage, "places of the cohort"),
    (outside_the_cohort, MalformedMessage, "places of the cohort"),
    (from_the_colluder(bytes(33) + LARGE), MalformedMessage, "c06 sealed something"),
    (from_the_colluder(LARGE + bytes(33)), MalformedMessage, "c06 sealed something"),
    (from_the_colluder(bytes(65)), MalformedMessage, "c06 sealed something"),
    (from_the_colluder(bytes(67)), MalformedMessage, "c06 sealed something"),
    (from_the_colluder(b""), MalformedMessage, "c06 sealed something"),
]


@pytest.mark.parametrize(
    ("attack", "error", "because"), ATTACKS, ids=lambda row: getattr(row, "__name__", None)
)
def test_a_forged_delivery_is_refused(federation, attack, error, because):
    refused(federation, error, because, federation.accept, VICTIM, attack(federation))
    assert federation.state[VICTIM].stage == "shared"
    federation.assert_safe(VICTIM, ["c05", COLLUDER])


@pytest.mark.parametrize(
    "session", [{"run_id": "another run"}, {"round": 2}, {"attempt": 2}], ids=str
)
def test_a_share_of_another_session_does_not_open_even_under_the_same_keys(federation, session):
    """Only the binding differs: another client of which the server has kept every byte."""
    other = session_of(federation.roster, **session)
    elsewhere = []
    for advert in federation.cohort:
        bare = replace(advert, signature=b"")
        signature = federation.identities[advert.client].sign(bare.signed(other.digest))
        elsewhere.append(replace(bare, signature=signature))
    same_keys = replace(
        federation.state[OTHER],
        stage=Stage.ADVERTISED,
        session=other.digest,
        adverts=(elsewhere[1],),
    )
    sealed = same_keys.share(tuple(elsewhere), federation.roster, federation.terms)[1]
    forged = with_sealed(federation, OTHER, sealed.sealed[0])
    refused(federation, BadSignature, "does not open", federation.accept, VICTIM, forged)
    federation.assert_safe(VICTIM)


def test_shares_of_two_views_of_the_cohort_do_not_mix():
    """A colluder signs two adverts; each half of the clients gets another one."""
    federation = Federation().until("begin")
    first = federation.cohort
    about = federation.session
    second = (
        *first[:-1],
        ClientSession.begin(federation.identities[COLLUDER], about)[1],
    )
    for name in federation.names:
        federation.share(name, second if name in {"c01", "c02", "c03"} else first)
    for name in federation.names:
        refused(federation, BadSignature, "does not open", federation.accept, name)
        federation.assert_safe(name, ["c05", COLLUDER])


def test_views_of_different_size_do_not_mix():
    federation = Federation().until("begin")
    for name in federation.names[:-1]:
        federation.share(name, federation.cohort[:-1] if name == OTHER else None)
    forged = federation.delivery(VICTIM, range(6))
    refused(federation, BadSignature, "does not open", federation.accept, VICTIM, forged)
    federation.assert_safe(VICTIM)


def test_shares_are_taken_once(federation):
    federation.until("accept")
    fewer = federation.delivery(VICTIM, range(5))
    for told in (None, fewer):
        refused(federation, ProtocolViolation, "accepted", federation.accept, VICTIM, told)
    federation.assert_safe(VICTIM)


def test_nothing_is_masked_before_shares_came_or_twice(federation):
    refused(federation, ProtocolViolation, "shared", federation.mask, VICTIM)
    federation.until("accept", "mask")
    refused(federation, ProtocolViolation, "masked", federation.mask, VICTIM)
    federation.assert_safe(VICTIM, ["c05", COLLUDER])


def test_steps_cannot_be_left_out():
    federation = Federation().until("begin")
    sharing = Federation().until("begin", "share").delivery(VICTIM)
    refused(federation, ProtocolViolation, "advertised", federation.accept, VICTIM, sharing)
    refused(federation, ProtocolViolation, "advertised", federation.mask, VICTIM)
    refused(federation, ProtocolViolation, "advertised", federation.sign, VICTIM)
    federation.assert_safe(VICTIM)


def test_a_colluders_masking_key_that_contributes_nothing_stops_the_victim():
    federation = Federation().until("begin")
    forged = replace(federation.advert[COLLUDER], masking_key=bytes(32))
    signature = federation.identities[COLLUDER].sign(forged.signed(federation.session.digest))
    federation.advert[COLLUDER] = replace(forged, signature=signature)
    honest = federation.names[:-1]
    for name in honest:
        federation.share(name)
    state = replace(federation.state[COLLUDER], adverts=federation.cohort)
    sealed = []
    for name in honest:
        key, associated = state._seal_of(COLLUDER, name, federation.advert[name].sealing_key)
        sealed.append(seal(key, bytes(66), associated))
    federation.keep(COLLUDER, state)
    federation.shares[COLLUDER] = SealedShares(tuple(sealed))
    for name in honest:
        federation.accept(name)
        refused(federation, BadSignature, "contributes nothing", federation.mask, name)
        assert name not in federation.masked
        federation.assert_safe(name, [COLLUDER])


@pytest.mark.parametrize("value", [2**19, -(2**19) - 1, 2**62, -(2**63)])
def test_a_value_outside_the_ring_is_never_sent(federation, value):
    """Values are int64, so there is no NaN and no infinity to refuse: the type has none."""
    federation.until("accept")
    federation.values[VICTIM][3] = value
    refused(federation, ValueError, "outside the ring of 20 bits", federation.mask, VICTIM)
    assert VICTIM not in federation.masked
    assert federation.values[VICTIM].dtype == np.int64


@pytest.mark.parametrize("bits", [-1, 0, 7, 57, 64])
def test_a_ring_of_an_unsupported_size_does_not_exist(federation, bits):
    refused(federation, ValueError, "8 to 56", Ring, bits)


def sharers_hidden_from_the_victim(federation, told):
    """All are told that all have shared, only the victim hears of `told` alone.

    The others see that the victim vouches for other sharers, and do not open its self-mask.
    """
    federation.until("begin", "share")
    federation.accept(VICTIM, federation.delivery(VICTIM, told))
    federation.mask(VICTIM)
    federation.until("accept", "mask", but=[VICTIM])
    for name in federation.names[1:]:
        refused(federation, BadSignature, "not that of c00", federation.sign, name)
    refused(federation, ProtocolViolation, "not among those", federation.sign, VICTIM)


@pytest.mark.parametrize("clients", [4, 7, 10, 13])
def test_hiding_sharers_in_the_complete_graph_uncovers_nothing(clients):
    """With t - 1 others to mask with, one of them is honest and has survived."""
    federation = Federation(clients)
    threshold = federation.terms.threshold_of(clients)
    sharers_hidden_from_the_victim(federation, range(threshold))
    colluders = federation.names[1 : 1 + federation.terms.colluders_of(clients)]
    federation.assert_safe(VICTIM, colluders)


@pytest.mark.parametrize("clients", [4, 7, 10, 13])
def test_calling_dropped_whom_the_victim_masked_with_uncovers_nothing(clients):
    """In the complete graph: t - 1 others masked with it, t other survivors have to sign."""
    federation = Federation(clients)
    threshold, names = federation.terms.threshold_of(clients), federation.names
    last = range(clients - threshold, clients)
    federation.until("begin", "share")
    federation.accept(VICTIM, federation.delivery(VICTIM, range(threshold)))
    federation.mask(VICTIM)
    federation.until("accept", "mask", but=[VICTIM])
    for place in last:
        told = (0, *last)
        refused(federation, BadSignature, "not that of c00", federation.sign, names[place], told)
    common = [names[place] for place in last if place < threshold]
    federation.assert_safe(VICTIM, common[: federation.terms.colluders_of(clients)])


def test_hiding_a_sparse_victims_neighbours_uncovers_nothing():
    federation = Federation(20, SPARSE)
    told = [place for place in range(20) if 3 < place < 17 or place == 0]  # threshold: 14
    sharers_hidden_from_the_victim(federation, told)
    federation.assert_safe(VICTIM)


def test_calling_dropped_the_neighbours_that_the_victim_masked_with_uncovers_nothing():
    """As above, but the victim is left with neighbours enough: a check in accept() won't do."""
    federation = Federation(20, SPARSE)
    federation.until("begin", "share")
    # The victim, place 0, masks with 1, 2 and 3 and does not hear of 17, 18 and 19.
    survivors = [place for place in range(20) if place not in {1, 2, 3}]
    others = federation.names[4:]
    federation.accept(VICTIM, federation.delivery(VICTIM, range(17)))
    federation.mask(VICTIM)
    for step in ("accept", "mask"):
        federation.until(step, but=[VICTIM])
    for name in others:
        refused(federation, BadSignature, "not that of c00", federation.sign, name, survivors)
    federation.assert_safe(VICTIM)
