"""The server, with two clients in league, lies to a client about the cohort."""

import secrets
from dataclasses import replace

import pytest
from adversary.federation import Federation, refused, session_of

from fedtune.errors import BadSignature, ConfigError, MalformedMessage, ProtocolViolation
from fedtune.secagg.client import ClientSession
from fedtune.secagg.keys import SERVER, Identity, Roster, RoundKey
from fedtune.secagg.session import Terms

VICTIM, OTHER, COLLUDER = "c00", "c03", "c06"
SMALL_ORDER = bytes(32)


@pytest.fixture
def federation():
    return Federation().until("begin")


def with_advert(federation, advert, name=None):
    """The cohort with one client's advert replaced."""
    return tuple(advert if a.client == (name or advert.client) else a for a in federation.cohort)


def signed_by(federation, identity, **changes):
    """The other client's advert with `changes`, signed by `identity`."""
    advert = replace(federation.advert[changes.pop("of", OTHER)], **changes)
    return replace(advert, signature=identity.sign(advert.signed(federation.session.digest)))


def keys_of_the_server():
    return {
        "sealing_key": RoundKey.generate().public_key,
        "masking_key": RoundKey.generate().public_key,
    }


def second_advert(federation, name, **session):
    """Another genuine advert of `name`, for the session or one that differs from it."""
    about = session_of(federation.roster, **session)
    return ClientSession.begin(federation.identities[name], about)[1]


def keys_substituted_signature_kept(f):
    return with_advert(f, replace(f.advert[OTHER], **keys_of_the_server()))


def keys_substituted_signed_by_a_colluder(f):
    return with_advert(f, signed_by(f, f.identities[COLLUDER], **keys_of_the_server()))


def keys_substituted_signed_by_the_server(f):
    return with_advert(f, signed_by(f, f.identities[SERVER], **keys_of_the_server()))


def keys_substituted_signed_by_a_stranger(f):
    return with_advert(f, signed_by(f, Identity.generate(OTHER), **keys_of_the_server()))


def keys_swapped_signature_kept(f):
    advert = f.advert[OTHER]
    return with_advert(
        f, replace(advert, sealing_key=advert.masking_key, masking_key=advert.sealing_key)
    )


def commitment_substituted(f):
    return with_advert(f, replace(f.advert[OTHER], commitment=secrets.token_bytes(32)))


def advert_renamed(f):
    return with_advert(f, replace(f.advert[OTHER], client="c03b"), OTHER)


def a_stranger_in_the_cohort(f):
    return (*f.cohort, ClientSession.begin(Identity.generate("d00"), f.session)[1])


def the_victims_masking_key_substituted(f):
    key = RoundKey.generate().public_key
    return with_advert(f, replace(f.advert[VICTIM], masking_key=key))


def the_victims_signature_altered(f):
    return with_advert(f, replace(f.advert[VICTIM], signature=bytes(64)))


def the_victims_advert_of_an_earlier_begin(f):
    return with_advert(f, second_advert(f, VICTIM))


def the_victim_left_out(f):
    return f.cohort[1:]


def nobody(f):
    return ()


def a_client_twice(f):
    return (*f.cohort[:3], *f.cohort[2:])


def a_client_twice_with_other_keys(f):
    return (*f.cohort, second_advert(f, COLLUDER))


def not_in_order(f):
    return f.cohort[::-1]


def the_server_as_a_client(f):
    return (signed_by(f, f.identities[SERVER], client=SERVER, **keys_of_the_server()), *f.cohort)


def a_colluder_with_the_victims_masking_key(f):
    key = f.advert[VICTIM].masking_key
    return with_advert(f, signed_by(f, f.identities[COLLUDER], of=COLLUDER, masking_key=key))


def a_colluder_seals_with_anothers_masking_key(f):
    key = f.advert[OTHER].masking_key
    return with_advert(f, signed_by(f, f.identities[COLLUDER], of=COLLUDER, sealing_key=key))


def a_colluder_with_one_key_for_both(f):
    key = f.advert[COLLUDER].masking_key
    return with_advert(f, signed_by(f, f.identities[COLLUDER], of=COLLUDER, sealing_key=key))


def only_the_victim(f):
    return f.cohort[:1]


def two_clients(f):
    return f.cohort[:2]


def malformed(field, length):
    def a_field_of_another_length(f):
        value = {field: secrets.token_bytes(length)}
        if field == "signature":
            return with_advert(f, replace(f.advert[COLLUDER], **value))
        return with_advert(f, signed_by(f, f.identities[COLLUDER], of=COLLUDER, **value))

    return a_field_of_another_length


def small_order_sealing_key(f):
    identity = f.identities[COLLUDER]
    return with_advert(f, signed_by(f, identity, of=COLLUDER, sealing_key=SMALL_ORDER))


NOT_THEIRS = "not that of c03"
ATTACKS = [
    (keys_substituted_signature_kept, BadSignature, NOT_THEIRS),
    (keys_substituted_signed_by_a_colluder, BadSignature, NOT_THEIRS),
    (keys_substituted_signed_by_the_server, BadSignature, NOT_THEIRS),
    (keys_substituted_signed_by_a_stranger, BadSignature, NOT_THEIRS),
    (keys_swapped_signature_kept, BadSignature, NOT_THEIRS),
    (commitment_substituted, BadSignature, NOT_THEIRS),
    (advert_renamed, BadSignature, "not in the roster"),
    (a_stranger_in_the_cohort, BadSignature, "d00 is not in the roster"),
    (the_victims_masking_key_substituted, ProtocolViolation, "own keys"),
    (the_victims_signature_altered, ProtocolViolation, "own keys"),
    (the_victims_advert_of_an_earlier_begin, ProtocolViolation, "own keys"),
    (the_victim_left_out, ProtocolViolation, "own keys"),
    (nobody, ProtocolViolation, "own keys"),
    (a_client_twice, ProtocolViolation, "order of its names"),
    (a_client_twice_with_other_keys, ProtocolViolation, "order of its names"),
    (not_in_order, ProtocolViolation, "order of its names"),
    (the_server_as_a_client, ProtocolViolation, "server is no client"),
    (a_colluder_with_the_victims_masking_key, ProtocolViolation, "two keys"),
    (a_colluder_seals_with_anothers_masking_key, ProtocolViolation, "two keys"),
    (a_colluder_with_one_key_for_both, ProtocolViolation, "two keys"),
    (only_the_victim, ProtocolViolation, "at least 3"),
    (two_clients, ProtocolViolation, "at least 3"),
    (malformed("sealing_key", 31), MalformedMessage, "a sealing key has 31"),
    (malformed("masking_key", 33), MalformedMessage, "a masking key has 33"),
    (malformed("commitment", 31), MalformedMessage, "a commitment has 31"),
    (malformed("signature", 63), MalformedMessage, "a signature has 63"),
    (small_order_sealing_key, BadSignature, "contributes nothing"),
]


@pytest.mark.parametrize(
    ("attack", "error", "because"), ATTACKS, ids=lambda row: getattr(row, "__name__", None)
)
def test_a_forged_cohort_is_refused(federation, attack, error, because):
    refused(federation, error, because, federation.share, VICTIM, attack(federation))
    assert federation.state[VICTIM].stage == "advertised"
    federation.assert_safe(VICTIM)


OTHER_SESSIONS = [
    {"run_id": "another run"},
    {"round": 2},
    {"attempt": 2},
    {"base_digest": "ee" * 32},
    {"manifest_digest": "ee" * 32},
    {"config_digest": "ee" * 32},
    {"adapter_digest": "ee" * 32},
    # The same digests with another meaning.
    {"base_digest": "22" * 32, "manifest_digest": "11" * 32},
    {"config_digest": "44" * 32, "adapter_digest": "33" * 32},
]


@pytest.mark.parametrize("session", OTHER_SESSIONS, ids="+".join)
def test_an_advert_of_another_session_is_refused(federation, session):
    cohort = with_advert(federation, second_advert(federation, OTHER, **session))
    refused(federation, BadSignature, NOT_THEIRS, federation.share, VICTIM, cohort)
    federation.assert_safe(VICTIM)


@pytest.mark.parametrize("session", OTHER_SESSIONS, ids="+".join)
def test_a_victim_lured_into_another_session_is_alone_there(session):
    """As with another global adapter for one client (Pasquini et al. 2022)."""
    federation = Federation()
    federation.begin(VICTIM, session_of(federation.roster, **session))
    federation.until("begin", but=[VICTIM])
    refused(federation, BadSignature, "not that of c01", federation.share, VICTIM)
    refused(federation, BadSignature, "not that of c00", federation.share, OTHER)
    federation.assert_safe(VICTIM)
    federation.assert_safe(OTHER)


def test_a_victim_with_another_roster_is_alone(federation):
    """The server would like to be c03 and puts its own key into one client's roster."""
    own = Identity.generate(OTHER)
    swapped = Roster({**federation.roster.keys, OTHER: own.public_key})
    state, advert = ClientSession.begin(federation.identities[VICTIM], session_of(swapped))
    federation.keep(VICTIM, state)
    forged = ClientSession.begin(own, session_of(swapped))[1]
    cohort = with_advert(federation, forged)
    cohort = tuple(advert if a.client == VICTIM else a for a in cohort)
    refused(federation, BadSignature, "not that of c01", state.share, cohort, swapped, Terms())
    federation.assert_safe(VICTIM)


TERMS = [
    (Terms(minimum=8), "at least 8"),
    (Terms(minimum=1, threshold=0.01), "do not withstand"),
    (Terms(threshold=0.0), "do not withstand"),
    (Terms(threshold=0.5), "do not withstand"),
    (Terms(colluding=0.5), "do not withstand"),
    (Terms(neighbours=0, colluding=0.1), "neighbours"),
    (Terms(neighbours=1, colluding=0.1), "neighbours"),
    (Terms(neighbours=2, colluding=0.25), "neighbours"),
    (Terms(neighbours=3, colluding=0.25), "neighbours"),
]


@pytest.mark.parametrize(("terms", "because"), TERMS)
def test_terms_that_do_not_protect_the_cohort_are_refused(federation, terms, because):
    refused(federation, ConfigError, because, terms.check, len(federation.cohort))
    federation.terms = terms
    refused(federation, ProtocolViolation, because, federation.share, VICTIM)
    federation.assert_safe(VICTIM)


def test_a_cohort_of_colluders_around_one_victim_takes_fewer_than_the_minimum(federation):
    """Fractions are of the cohort, and the server picks the cohort: only `minimum` is absolute."""
    federation.terms = Terms(minimum=4)
    cohort = tuple(federation.advert[name] for name in (VICTIM, "c05", COLLUDER))
    refused(federation, ProtocolViolation, "at least 4", federation.share, VICTIM, cohort)
    federation.assert_safe(VICTIM)


def test_shares_are_sealed_once(federation):
    federation.share(VICTIM)
    refused(federation, ProtocolViolation, "shared in this session", federation.share, VICTIM)
    other_cohort = federation.cohort[:-1]
    refused(federation, ProtocolViolation, "shared in this", federation.share, VICTIM, other_cohort)
    federation.assert_safe(VICTIM)
