"""Up to two of seven clients misbehave towards an honest server."""

import secrets
from dataclasses import replace
from itertools import combinations

import pytest
from adversary.federation import RING, Federation, refused, session_of

from fedtune.errors import (
    BadSignature,
    ConfigError,
    MalformedMessage,
    ProtocolViolation,
    TooFewClients,
    UnmaskingFailed,
)
from fedtune.secagg.client import ClientSession
from fedtune.secagg.keys import SERVER, Identity, seal
from fedtune.secagg.messages import (
    MaskedValues,
    SealedShares,
    sharers_signed,
    survivors_signed,
)
from fedtune.secagg.server import Aggregation
from fedtune.secagg.session import Terms
from fedtune.secagg.shamir import PRIME, SHARE_BYTES

LIAR, OTHER, LATE = "c02", "c01", "c06"
ALL = tuple(range(7))
WORKERS = ALL[:-1]
EMPTY = MaskedValues(bytes(15), bytes(64))
LARGE = PRIME.to_bytes(SHARE_BYTES, "little")


@pytest.fixture
def federation():
    return Federation()


def server_of(f, phase, dropped=(LATE,)):
    """An honest server that has come to `phase`; `dropped` have only shared keys."""
    server = Aggregation(f.session.digest, f.roster, f.terms, 6)
    f.until("begin")
    if phase == "adverts":
        return server
    for name in f.names:
        server.receive_advert(name, f.advert[name])
    cohort = server.close_adverts()
    f.until("share")
    if phase == "shares":
        return server
    for name in f.names:
        server.receive_shares(name, f.shares[name])
    assert cohort == f.cohort
    deliveries = server.close_shares()
    server.expect(RING)
    for name in f.names:
        if name not in dropped:
            f.accept(name, deliveries[name])
            f.mask(name)
    if phase == "values":
        return server
    for name in f.masked:
        server.receive_values(name, f.masked[name])
    survivors = server.close_values().survivors
    for name in f.masked:
        f.sign(name, survivors)
    if phase == "signatures":
        return server
    for name in f.masked:
        server.receive_signature(name, f.signature[name])
    unmasking = server.close_signatures()
    for name in f.masked:
        f.reveal(name, unmasking)
    return server


def finish(f, server, names):
    """The revealed shares of `names` and the sum."""
    for name in names:
        server.receive_reveal(name, f.revealed[name])
    return server.close_reveals().tolist()


def plain(f, names):
    return sum(f.values[name] for name in names).tolist()


def re_signed(f, name=LIAR, identity=None, session=None, **changes):
    advert = replace(f.advert[name], **changes)
    about = session or f.session
    return replace(
        advert, signature=(identity or f.identities[name]).sign(advert.signed(about.digest))
    )


def another(f, name):
    return ClientSession.begin(f.identities[name], f.session)[1]


def stranger(f):
    return ClientSession.begin(Identity.generate("d00"), f.session)[1]


ADVERTS = [
    ("in another's name", lambda f: (LIAR, f.advert["c03"]), ProtocolViolation, "keys of 'c03'"),
    ("as the server", lambda f: (SERVER, re_signed(f, client=SERVER)), ProtocolViolation, "keys"),
    ("of a stranger", lambda f: ("d00", stranger(f)), BadSignature, "not in the roster"),
    ("twice", lambda f: (OTHER, f.advert[OTHER]), ProtocolViolation, "sent its keys already"),
    ("two different", lambda f: (OTHER, another(f, OTHER)), ProtocolViolation, "sent its keys"),
    (
        "signed by another",
        lambda f: (LIAR, re_signed(f, identity=f.identities["c03"])),
        BadSignature,
        "not that of c02",
    ),
    (
        "signed by the server",
        lambda f: (LIAR, re_signed(f, identity=f.identities[SERVER])),
        BadSignature,
        "not that of c02",
    ),
    (
        "of an earlier attempt",
        lambda f: (LIAR, re_signed(f, session=session_of(f.roster, attempt=2))),
        BadSignature,
        "not that of c02",
    ),
    (
        "with another's key",
        lambda f: (LIAR, re_signed(f, masking_key=f.advert[OTHER].masking_key)),
        ProtocolViolation,
        "a key that is there already",
    ),
    (
        "with another's key for another use",
        lambda f: (LIAR, re_signed(f, masking_key=f.advert[OTHER].sealing_key)),
        ProtocolViolation,
        "a key that is there already",
    ),
    (
        "with one key for both",
        lambda f: (LIAR, re_signed(f, masking_key=f.advert[LIAR].sealing_key)),
        ProtocolViolation,
        "a key that is there already",
    ),
    (
        "with a short key",
        lambda f: (LIAR, re_signed(f, masking_key=bytes(31))),
        MalformedMessage,
        "a masking key has 31",
    ),
    (
        "without a signature",
        lambda f: (LIAR, replace(f.advert[LIAR], signature=b"")),
        MalformedMessage,
        "a signature has 0",
    ),
]


@pytest.mark.parametrize(
    ("forged", "error", "because"), [row[1:] for row in ADVERTS], ids=[row[0] for row in ADVERTS]
)
def test_a_forged_advert_is_not_counted(federation, forged, error, because):
    server = server_of(federation, "adverts")
    server.receive_advert(OTHER, federation.advert[OTHER])
    refused(federation, error, because, server.receive_advert, *forged(federation))
    for name in federation.names:
        if name not in {OTHER, LIAR}:
            server.receive_advert(name, federation.advert[name])
    assert [a.client for a in server.close_adverts()] == [n for n in federation.names if n != LIAR]


@pytest.mark.parametrize("which", ["sealing_key", "masking_key"])
def test_a_key_that_contributes_nothing_does_not_get_into_the_cohort(federation, which):
    server = server_of(federation, "adverts")
    advert = re_signed(federation, **{which: bytes(32)})
    refused(federation, BadSignature, "contributes nothing", server.receive_advert, LIAR, advert)


def test_a_cohort_too_small_is_not_closed(federation):
    server = server_of(federation, "adverts")
    for name in federation.names[:2]:
        server.receive_advert(name, federation.advert[name])
    refused(federation, TooFewClients, "2 clients sent keys", server.close_adverts)


@pytest.mark.parametrize(
    "terms", [Terms(threshold=0.1), Terms(colluding=0.9), Terms(neighbours=2, colluding=0.25)]
)
def test_a_cohort_that_the_terms_do_not_protect_is_not_closed(federation, terms):
    federation.terms = terms
    server = server_of(federation, "adverts")
    for name in federation.names:
        server.receive_advert(name, federation.advert[name])
    refused(federation, ConfigError, "secagg", server.close_adverts)


SHARES = [
    ("twice", lambda f: (OTHER, f.shares[OTHER]), ProtocolViolation, "has shared already"),
    ("by a stranger", lambda f: ("d00", f.shares[LIAR]), ProtocolViolation, "cohort"),
    ("as the server", lambda f: (SERVER, f.shares[LIAR]), ProtocolViolation, "cohort"),
    (
        "too few",
        lambda f: (LIAR, SealedShares(f.shares[LIAR].sealed[:-1])),
        MalformedMessage,
        "5 sealed shares, not 6",
    ),
    (
        "for itself too",
        lambda f: (LIAR, SealedShares((*f.shares[LIAR].sealed, bytes(82)))),
        MalformedMessage,
        "7 sealed shares, not 6",
    ),
    (
        "too short",
        lambda f: (LIAR, SealedShares((bytes(81),) * 6)),
        MalformedMessage,
        "a sealed share has 81",
    ),
    (
        "too long",
        lambda f: (LIAR, SealedShares((bytes(83),) * 6)),
        MalformedMessage,
        "a sealed share has 83",
    ),
]


@pytest.mark.parametrize(
    ("forged", "error", "because"), [row[1:] for row in SHARES], ids=[row[0] for row in SHARES]
)
def test_forged_shares_are_not_counted(federation, forged, error, because):
    server = server_of(federation, "shares")
    server.receive_shares(OTHER, federation.shares[OTHER])
    refused(federation, error, because, server.receive_shares, *forged(federation))
    for name in federation.names:
        if name not in {OTHER, LIAR}:
            server.receive_shares(name, federation.shares[name])
    delivered = server.close_shares()
    assert sorted(delivered) == [name for name in federation.names if name != LIAR]
    assert {delivery.sharers for delivery in delivered.values()} == {(0, 1, 3, 4, 5, 6)}


def values(f, change):
    """The liar's vector with its bytes changed."""
    return LIAR, replace(f.masked[LIAR], packed=change(f.masked[LIAR].packed))


VALUES = [
    ("twice", lambda f: (OTHER, f.masked[OTHER]), ProtocolViolation, "in the sum already"),
    ("of other bytes", lambda f: (OTHER, f.masked[LIAR]), ProtocolViolation, "already"),
    ("by a stranger", lambda f: ("d00", f.masked[LIAR]), ProtocolViolation, "cohort"),
    ("as the server", lambda f: (SERVER, f.masked[LIAR]), ProtocolViolation, "cohort"),
    ("cut", lambda f: values(f, lambda p: p[:-1]), MalformedMessage, "14 bytes are not 6 values"),
    ("longer", lambda f: values(f, lambda p: p + b"\0"), MalformedMessage, "16 bytes are not"),
    ("empty", lambda f: values(f, lambda p: b""), MalformedMessage, "0 bytes are not"),
    (
        "vouched for by another",
        lambda f: (LIAR, replace(f.masked[LIAR], voucher=f.masked[OTHER].voucher)),
        BadSignature,
        "not that of c02",
    ),
    (
        "vouching for other sharers",
        lambda f: (
            LIAR,
            replace(
                f.masked[LIAR],
                voucher=f.identities[LIAR].sign(sharers_signed(f.state[LIAR].binding, ALL[:-1])),
            ),
        ),
        BadSignature,
        "not that of c02",
    ),
]


@pytest.mark.parametrize(
    ("forged", "error", "because"), [row[1:] for row in VALUES], ids=[row[0] for row in VALUES]
)
def test_forged_values_leave_the_sum_as_it_is(federation, forged, error, because):
    server = server_of(federation, "values")
    server.receive_values(OTHER, federation.masked[OTHER])
    before = server._total.copy()
    refused(federation, error, because, server.receive_values, *forged(federation))
    assert (server._total == before).all()


def test_values_of_a_client_that_has_not_shared_keys_are_refused(federation):
    server = server_of(federation, "shares")
    for name in federation.names[:-1]:
        server.receive_shares(name, federation.shares[name])
    server.close_shares()
    server.expect(RING)
    because = "c06 has not shared its keys"
    refused(federation, ProtocolViolation, because, server.receive_values, LATE, EMPTY)


SIGNATURES = [
    ("twice", lambda f: (OTHER, f.signature[OTHER]), ProtocolViolation, "has signed already"),
    ("for another", lambda f: ("c03", f.signature[LIAR]), BadSignature, "not that of c03"),
    ("by the dropped", lambda f: (LATE, f.signature[LIAR]), ProtocolViolation, "survivors"),
    ("by a stranger", lambda f: ("d00", f.signature[LIAR]), ProtocolViolation, "cohort"),
    ("by the server", lambda f: (SERVER, f.signature[LIAR]), ProtocolViolation, "cohort"),
    ("cut", lambda f: (LIAR, f.signature[LIAR][:-1]), BadSignature, "not that of c02"),
    ("empty", lambda f: (LIAR, b""), BadSignature, "not that of c02"),
    ("its advert's", lambda f: (LIAR, f.advert[LIAR].signature), BadSignature, "not that of c02"),
    (
        "over another set",
        lambda f: (
            LIAR,
            f.identities[LIAR].sign(survivors_signed(f.state[LIAR].binding, ALL, ALL)),
        ),
        BadSignature,
        "not that of c02",
    ),
]


@pytest.mark.parametrize(
    ("forged", "error", "because"),
    [row[1:] for row in SIGNATURES],
    ids=[row[0] for row in SIGNATURES],
)
def test_a_forged_signature_is_not_counted(federation, forged, error, because):
    server = server_of(federation, "signatures")
    server.receive_signature(OTHER, federation.signature[OTHER])
    refused(federation, error, because, server.receive_signature, *forged(federation))
    for name in ("c00", "c03", "c04"):
        server.receive_signature(name, federation.signature[name])
    refused(federation, TooFewClients, "4 clients signed", server.close_signatures)


def with_share(f, share, kind="self_masks", name=LIAR):
    reveal = f.revealed[name]
    return name, replace(reveal, **{kind: (share, *getattr(reveal, kind)[1:])})


REVEALS = [
    ("twice", lambda f: (OTHER, f.revealed[OTHER]), ProtocolViolation, "has revealed already"),
    ("by the dropped", lambda f: (LATE, f.revealed[LIAR]), ProtocolViolation, "survivors"),
    ("by a stranger", lambda f: ("d00", f.revealed[LIAR]), ProtocolViolation, "cohort"),
    ("a share as large as the prime", lambda f: with_share(f, LARGE), MalformedMessage, "not a"),
    ("all ones", lambda f: with_share(f, b"\xff" * 33), MalformedMessage, "not a share"),
    (
        "a key's share as large as the prime",
        lambda f: with_share(f, LARGE, "masking_keys"),
        MalformedMessage,
        "not a share",
    ),
    ("a short share", lambda f: with_share(f, bytes(32)), MalformedMessage, "a share has 32"),
    (
        "too few shares",
        lambda f: (LIAR, replace(f.revealed[LIAR], self_masks=())),
        MalformedMessage,
        "0 shares of self-masks, not 6",
    ),
    (
        "both kinds for one client",
        lambda f: (LIAR, replace(f.revealed[LIAR], masking_keys=(bytes(33),) * 2)),
        MalformedMessage,
        "2 shares of masking keys, not 1",
    ),
]


@pytest.mark.parametrize(
    ("forged", "error", "because"), [row[1:] for row in REVEALS], ids=[row[0] for row in REVEALS]
)
def test_a_forged_reveal_is_not_counted(federation, forged, error, because):
    server = server_of(federation, "reveals")
    server.receive_reveal(OTHER, federation.revealed[OTHER])
    refused(federation, error, because, server.receive_reveal, *forged(federation))
    others = [name for name in federation.names[:6] if name not in {OTHER, LIAR}]
    assert finish(federation, server, others) == plain(federation, federation.names[:6])


def lie(f, name, kind="self_masks"):
    f.revealed[name] = with_share(f, secrets.token_bytes(32) + b"\0", kind, name)[1]


@pytest.mark.parametrize("kind", ["self_masks", "masking_keys"])
@pytest.mark.parametrize("place", WORKERS)
def test_one_wrong_share_stops_nothing_while_one_more_than_needed_answered(place, kind):
    federation = Federation()
    server = server_of(federation, "reveals")
    lie(federation, federation.names[place], kind)
    total = finish(federation, server, federation.names[:6])
    assert total == plain(federation, federation.names[:6])


@pytest.mark.parametrize("kind", ["self_masks", "masking_keys"])
def test_a_wrong_share_fails_the_session_if_just_enough_answered(federation, kind):
    server = server_of(federation, "reveals")
    lie(federation, LIAR, kind)
    refused(
        federation, UnmaskingFailed, "5 clients", finish, federation, server, federation.names[:5]
    )


def test_too_few_reveals_open_nothing(federation):
    server = server_of(federation, "reveals")
    because = "4 clients revealed, secure aggregation needs 5"
    refused(federation, TooFewClients, because, finish, federation, server, federation.names[:4])


@pytest.mark.parametrize("liars", list(combinations(("c00", "c03", "c05"), 2)))
def test_two_wrong_answers_among_those_used_give_no_wrong_sum(federation, liars):
    server = server_of(federation, "reveals")
    for name in liars:
        lie(federation, name)
    refused(
        federation, UnmaskingFailed, "6 clients", finish, federation, server, federation.names[:6]
    )


def test_reveals_of_another_survivor_exchanged_give_no_wrong_sum(federation):
    server = server_of(federation, "reveals")
    swapped = federation.revealed[LIAR]
    federation.revealed[LIAR] = federation.revealed[OTHER]
    federation.revealed[OTHER] = swapped
    refused(
        federation, UnmaskingFailed, "6 clients", finish, federation, server, federation.names[:6]
    )


def test_shares_that_fit_no_polynomial_fail_the_session_and_give_no_wrong_sum(federation):
    """One client sealed random shares: nobody can tell before they are revealed."""
    federation.until("begin", "share")
    state = federation.state[LIAR]
    sealed = []
    for advert in federation.cohort:
        if advert.client != LIAR:
            key, associated = state._seal_of(LIAR, advert.client, advert.sealing_key)
            pair = (secrets.token_bytes(32) + b"\0") * 2
            sealed.append(seal(key, pair, associated))
    server = Aggregation(federation.session.digest, federation.roster, federation.terms, 6)
    federation.shares[LIAR] = SealedShares(tuple(sealed))
    for name in federation.names:
        server.receive_advert(name, federation.advert[name])
    server.close_adverts()
    for name in federation.names:
        server.receive_shares(name, federation.shares[name])
    deliveries = server.close_shares()
    server.expect(RING)
    for name in federation.names:
        federation.accept(name, deliveries[name])
        server.receive_values(name, federation.mask(name))
    survivors = server.close_values().survivors
    for name in federation.names:
        server.receive_signature(name, federation.sign(name, survivors))
    unmasking = server.close_signatures()
    for name in federation.names:
        federation.reveal(name, unmasking)
    refused(federation, UnmaskingFailed, "7 clients", finish, federation, server, federation.names)


def test_a_session_below_the_minimum_is_not_opened_though_the_threshold_is_met():
    federation = Federation(terms=Terms(minimum=6))
    server = server_of(federation, "signatures")
    for name in federation.names[:5]:
        server.receive_signature(name, federation.signature[name])
    refused(federation, TooFewClients, "needs 6", server.close_signatures)


MESSAGES = {
    "adverts": lambda s, f: s.receive_advert(LIAR, f.advert[LIAR]),
    "shares": lambda s, f: s.receive_shares(LIAR, f.shares[LIAR]),
    "values": lambda s, f: s.receive_values(LIAR, f.masked[LIAR]),
    "signatures": lambda s, f: s.receive_signature(LIAR, f.signature[LIAR]),
    "reveals": lambda s, f: s.receive_reveal(LIAR, f.revealed[LIAR]),
}
CLOSES = {
    "adverts": Aggregation.close_adverts,
    "shares": Aggregation.close_shares,
    "values": Aggregation.close_values,
    "signatures": Aggregation.close_signatures,
    "reveals": Aggregation.close_reveals,
}


@pytest.mark.parametrize("phase", MESSAGES)
def test_messages_of_another_phase_are_refused(phase):
    done = Federation()
    server_of(done, "reveals")
    federation = Federation()
    server = server_of(federation, phase)
    for other, send in MESSAGES.items():
        if other != phase:
            because = f"a message of the phase {other} in {phase}"
            refused(federation, ProtocolViolation, because, send, server, done)
            refused(federation, ProtocolViolation, because, CLOSES[other], server)


def test_a_finished_session_gives_its_sum_once(federation):
    server = server_of(federation, "reveals")
    assert finish(federation, server, federation.names[:6]) == plain(
        federation, federation.names[:6]
    )
    because = "a message of the phase reveals in done"
    refused(federation, ProtocolViolation, because, server.close_reveals)
    refused(
        federation,
        ProtocolViolation,
        because,
        server.receive_reveal,
        LIAR,
        federation.revealed[LIAR],
    )


@pytest.mark.parametrize("phase", ["shares", "values"])
def test_too_few_messages_close_no_phase(federation, phase):
    server = server_of(federation, phase)
    for name in federation.names[:4]:
        sent = federation.shares if phase == "shares" else federation.masked
        getattr(server, f"receive_{phase}")(name, sent[name])
    refused(federation, TooFewClients, "4 clients", CLOSES[phase], server)


def test_a_server_restarted_after_the_values_goes_on(federation):
    server = server_of(federation, "values")
    for name in federation.masked:
        server.receive_values(name, federation.masked[name])
    sealed = server.close_values()
    server = Aggregation.resume(sealed, federation.roster, federation.terms)
    for name in federation.masked:
        server.receive_signature(name, federation.sign(name, sealed.survivors))
    unmasking = server.close_signatures()
    for name in federation.masked:
        federation.reveal(name, unmasking)
    total = finish(federation, server, federation.names[:6])
    assert total == plain(federation, federation.names[:6])
    because = "a message of the phase values"
    late = Aggregation.resume(sealed, federation.roster, federation.terms)
    refused(federation, ProtocolViolation, because, late.receive_values, LATE, EMPTY)
