"""The server, with two clients in league, lies to a client about survivors and signatures."""

from dataclasses import replace
from itertools import product

import pytest
from adversary.federation import SPARSE, Federation, refused, session_of

from fedtune.errors import BadSignature, MalformedMessage, ProtocolViolation
from fedtune.secagg.client import Stage
from fedtune.secagg.keys import SERVER, Identity
from fedtune.secagg.messages import Unmasking, survivors_signed
from fedtune.secagg.session import Terms

VICTIM, OTHER, COLLUDERS = "c00", "c01", ["c05", "c06"]
ALL = tuple(range(7))
ED25519_ORDER = 2**252 + 27742317777372353535851937790883648493


@pytest.fixture
def federation():
    """All seven clients have sent their vectors."""
    return Federation().until_masked()


@pytest.fixture
def signed(federation):
    """All have signed that all survive."""
    return federation.until("sign")


SURVIVORS = [
    ("without the victim", ALL[1:], ProtocolViolation, "that it is not in"),
    ("below the threshold", (0, 1, 2, 3), ProtocolViolation, "4 clients survive, at least 5"),
    ("the victim alone", (0,), ProtocolViolation, "1 clients survive"),
    ("nobody", (), ProtocolViolation, "that it is not in"),
    ("one of them twice", (0, 1, 2, 3, 3), MalformedMessage, "ascending"),
    ("not in order", (1, 0, 2, 3, 4), MalformedMessage, "ascending"),
    ("outside the cohort", (0, 1, 2, 3, 7), MalformedMessage, "places of the cohort"),
    ("before the cohort", (-2, -1, 0, 1, 2, 3), MalformedMessage, "places of the cohort"),
]


@pytest.mark.parametrize(
    ("survivors", "error", "because"),
    [row[1:] for row in SURVIVORS],
    ids=[row[0] for row in SURVIVORS],
)
def test_a_forged_survivor_set_is_not_signed(federation, survivors, error, because):
    refused(federation, error, because, federation.sign, VICTIM, survivors)
    assert federation.state[VICTIM].stage == "masked"
    federation.assert_safe(VICTIM, COLLUDERS)


def test_fewer_survivors_or_signatures_than_the_minimum_open_nothing():
    """The threshold is five, but the terms want six in every sum."""
    federation = Federation(terms=Terms(minimum=6)).until_masked()
    because = "5 clients survive, at least 6"
    refused(federation, ProtocolViolation, because, federation.sign, VICTIM, ALL[:5])
    federation.until("sign")
    because = "5 clients signed the survivor set, at least 6"
    unmasking = federation.unmasking(ALL[:5])
    refused(federation, ProtocolViolation, because, federation.reveal, VICTIM, unmasking)
    federation.assert_safe(VICTIM, COLLUDERS)


def test_a_survivor_who_has_not_shared_keys_is_not_signed():
    federation = Federation().until("begin", "share")
    for name in federation.names[:-1]:
        federation.accept(name, federation.delivery(name, range(6)))
        federation.mask(name)
    because = "not among those who shared keys"
    refused(federation, ProtocolViolation, because, federation.sign, VICTIM, ALL)
    federation.assert_safe(VICTIM, COLLUDERS)


def test_survivors_whose_sparse_graph_falls_apart_are_not_signed():
    """Of 24 in a ring with 3 on either side, one more colluder than allowed splits the rest."""
    federation = Federation(24, SPARSE).until_masked()
    # Gaps of two behind place 3 and of four behind place 12: one colluder completes the first.
    survivors = [p for p in range(24) if p not in {4, 5, 12, 13, 14, 15}]
    assert len(survivors) >= federation.terms.fewest_survivors(24)
    because = "withstand 0 colluders, the terms ask for 3"
    refused(federation, ProtocolViolation, because, federation.sign, VICTIM, survivors)
    federation.assert_safe(VICTIM, ["c06"])


def test_a_second_survivor_set_is_not_signed(signed):
    for survivors in (ALL[:-1], ALL[:5], (0, 2, 3, 4, 5, 6), (), ALL[1:]):
        because = "has signed another survivor set"
        refused(signed, ProtocolViolation, because, signed.sign, VICTIM, survivors)
    signed.assert_safe(VICTIM, COLLUDERS)
    signed.until("reveal")
    refused(signed, ProtocolViolation, because, signed.sign, VICTIM, ALL[:-1])


def test_of_two_survivor_sets_at_most_one_finds_enough_signatures(federation):
    """Five honest clients sign one set each, in every way; two colluders sign both."""
    sets = (ALL, (0, 1, 2, 3, 4, 5))
    masked = dict(federation.state)
    opened = set()
    for choice in product((0, 1), repeat=5):
        revealed = set()
        for which, survivors in enumerate(sets):
            federation.signature.clear()
            federation.state = dict(masked)
            honest = [name for name, c in zip(federation.names, choice, strict=False) if c == which]
            liars = [name for name in COLLUDERS if federation.names.index(name) in survivors]
            for name in honest + liars:
                federation.sign(name, survivors)
            signers = sorted(federation.names.index(name) for name in federation.signature)
            unmasking = federation.unmasking(signers)
            for name in honest:
                if len(signers) >= 5:
                    federation.reveal(name, unmasking)
                    revealed.add(which)
                else:
                    because = "signed the survivor set, at least 5"
                    refused(
                        federation, ProtocolViolation, because, federation.reveal, name, unmasking
                    )
        assert len(revealed) <= 1
        opened |= revealed
    assert opened == {0, 1}


@pytest.mark.parametrize("step", ["accept", "mask", "sign"])
def test_nothing_is_revealed_before_the_survivors_are_signed(step, signed):
    federation = Federation().until("begin", "share")
    unmasking = signed.unmasking()
    for earlier in ("accept", "mask", "sign")[: ("accept", "mask", "sign").index(step)]:
        federation.until(earlier)
    because = "a request to reveal when"
    refused(federation, ProtocolViolation, because, federation.reveal, VICTIM, unmasking)
    federation.assert_safe(VICTIM, COLLUDERS)


def with_signature(f, place, signature):
    """The genuine signatures but for one."""
    genuine = f.unmasking()
    replaced = (*genuine.signatures[:place], signature, *genuine.signatures[place + 1 :])
    return replace(genuine, signatures=replaced)


def signed_of(f, *, sharers=ALL, survivors=ALL, binding=None):
    """What a client would sign of such sets."""
    return survivors_signed(binding or f.state[VICTIM].binding, sharers, survivors)


def by(name, **what):
    def signature_over_something_else(f):
        return with_signature(f, 3, f.identities[name].sign(signed_of(f, **what)))

    return signature_over_something_else


def by_a_stranger(f):
    return with_signature(f, 3, Identity.generate("c03").sign(signed_of(f)))


def over_another_session(f):
    other = Federation()
    other.identities, other.roster = f.identities, f.roster
    other.session = session_of(f.roster, attempt=2)
    other.until_masked().until("sign")
    return other.unmasking()


def over_another_cohort(f):
    other = Federation()
    other.identities, other.roster, other.session = f.identities, f.roster, f.session
    other.until_masked().until("sign")
    return other.unmasking()


def of_anothers_advert(f):
    return with_signature(f, 3, f.advert["c03"].signature)


def copied_from_another(f):
    return with_signature(f, 3, f.signature["c04"])


def one_bit_flipped(f):
    data = bytearray(f.signature["c03"])
    data[40] ^= 4
    return with_signature(f, 3, bytes(data))


def non_canonical(f):
    data = f.signature["c03"]
    large = int.from_bytes(data[32:], "little") + ED25519_ORDER
    return with_signature(f, 3, data[:32] + large.to_bytes(32, "little"))


def truncated(f):
    return with_signature(f, 3, f.signature["c03"][:-1])


def zero(f):
    return with_signature(f, 3, bytes(64))


def too_few(f):
    return f.unmasking((0, 1, 2, 3))


def none(f):
    return Unmasking((), ())


def one_repeated(f):
    return f.unmasking((0, 1, 2, 3, 3, 3))


def one_under_all_names(f):
    return Unmasking(ALL, (f.signature[VICTIM],) * 7)


def before_the_cohort(f):
    return f.unmasking((-2, -1, 0, 1, 2, 3))


def outside_the_cohort(f):
    return Unmasking((*ALL, 7), (*f.unmasking().signatures, bytes(64)))


def fewer_signatures_than_signers(f):
    return replace(f.unmasking(), signatures=f.unmasking().signatures[:-1])


def more_signatures_than_signers(f):
    return replace(f.unmasking((0, 1, 2, 3)), signatures=f.unmasking().signatures)


NOT_C03 = "not that of c03"
UNMASKINGS = [
    (by(SERVER), BadSignature, NOT_C03),
    (by("c06"), BadSignature, NOT_C03),
    (by_a_stranger, BadSignature, NOT_C03),
    (by("c03", survivors=ALL[:-1]), BadSignature, NOT_C03),
    (by("c03", sharers=ALL[:-1], survivors=ALL[:-1]), BadSignature, NOT_C03),
    (by("c03", sharers=ALL, survivors=()), BadSignature, NOT_C03),
    (by("c03", binding=bytes(32)), BadSignature, NOT_C03),
    (over_another_session, BadSignature, "not that of c00"),
    (over_another_cohort, BadSignature, "not that of c00"),
    (of_anothers_advert, BadSignature, NOT_C03),
    (copied_from_another, BadSignature, NOT_C03),
    (one_bit_flipped, BadSignature, NOT_C03),
    (non_canonical, BadSignature, NOT_C03),
    (truncated, BadSignature, NOT_C03),
    (zero, BadSignature, NOT_C03),
    (too_few, ProtocolViolation, "4 clients signed the survivor set, at least 5"),
    (none, ProtocolViolation, "0 clients signed the survivor set"),
    (one_repeated, MalformedMessage, "ascending"),
    (one_under_all_names, BadSignature, "not that of c01"),
    (before_the_cohort, MalformedMessage, "places of the cohort"),
    (outside_the_cohort, MalformedMessage, "places of the cohort"),
    (fewer_signatures_than_signers, MalformedMessage, "as many signatures"),
    (more_signatures_than_signers, MalformedMessage, "as many signatures"),
]


@pytest.mark.parametrize(
    ("attack", "error", "because"), UNMASKINGS, ids=lambda row: getattr(row, "__name__", None)
)
def test_nothing_is_revealed_for_forged_signatures(signed, attack, error, because):
    refused(signed, error, because, signed.reveal, VICTIM, attack(signed))
    assert signed.state[VICTIM].stage == "signed"
    signed.assert_safe(VICTIM, COLLUDERS)


def test_a_signature_by_a_client_that_dropped_out_does_not_count():
    federation = Federation().until_masked(but=["c06"])
    federation.accept("c06")
    survivors = ALL[:-1]
    for name in federation.names[:4]:
        federation.sign(name, survivors)
    message = survivors_signed(federation.state[VICTIM].binding, ALL, survivors)
    federation.signature["c06"] = federation.identities["c06"].sign(message)
    unmasking = federation.unmasking((0, 1, 2, 3, 6))
    because = "a signer is not among the survivors"
    refused(federation, ProtocolViolation, because, federation.reveal, VICTIM, unmasking)
    federation.assert_safe(VICTIM, COLLUDERS)


def test_clients_that_were_told_of_other_sharers_sign_nothing_together():
    """The server hides from the victim that c06 shared keys; the sets to sign look the same."""
    federation = Federation().until("begin", "share")
    for name in federation.names[:-1]:
        told = range(6) if name == VICTIM else None
        federation.accept(name, federation.delivery(name, told))
        federation.mask(name)
    for name in federation.names[:-1]:
        because = "not that of c01" if name == VICTIM else "not that of c00"
        refused(federation, BadSignature, because, federation.sign, name, ALL[:-1])
    federation.assert_safe(VICTIM, COLLUDERS)


def test_being_asked_again_with_other_signatures_gives_the_same_answer(signed):
    signed.until("reveal")
    first = signed.revealed[VICTIM]
    for signers in (ALL, ALL[:5], ALL[2:], (0, 2, 3, 4, 6)):
        assert signed.reveal(VICTIM, signed.unmasking(signers)) == first
    for attack, error, because in UNMASKINGS:
        refused(signed, error, because, signed.reveal, VICTIM, attack(signed))


@pytest.mark.parametrize("stage", ["masked", "signed", "revealed"])
def test_a_state_from_before_the_reveal_gives_the_same_bytes_and_no_other_kind(federation, stage):
    federation.until("sign", "reveal")
    signature, reveal = federation.signature[VICTIM], federation.revealed[VICTIM]
    old = next(s for s in federation.history if s.name == VICTIM and s.stage == stage)
    federation.keep(VICTIM, old)
    assert federation.sign(VICTIM) == signature
    assert federation.reveal(VICTIM) == reveal
    assert len(reveal.self_masks) == 7
    assert reveal.masking_keys == ()


def test_a_rolled_back_victim_reveals_no_second_kind_alone(federation):
    """A client that lost its signature signs another set; the others' signatures still lack."""
    masked = federation.state[VICTIM]
    federation.until("sign", "reveal")
    federation.keep(VICTIM, masked)
    federation.sign(VICTIM, ALL[:-1])
    for name in federation.names[1:]:
        because = "has signed another survivor set"
        refused(federation, ProtocolViolation, because, federation.sign, name, ALL[:-1])
    replayed = federation.unmasking(range(6))
    refused(federation, BadSignature, "not that of c01", federation.reveal, VICTIM, replayed)
    liars = ["c05"]
    for name in liars:
        message = survivors_signed(masked.binding, ALL, ALL[:-1])
        federation.signature[name] = federation.identities[name].sign(message)
    because = "2 clients signed the survivor set"
    unmasking = federation.unmasking((0, 5))
    refused(federation, ProtocolViolation, because, federation.reveal, VICTIM, unmasking)
    assert federation.state[VICTIM].stage is Stage.SIGNED


def test_every_client_reveals_one_kind_of_share_of_each_client():
    """Self-masks of survivors, keys of the dropped; the server's knowledge opens no vector."""
    federation = Federation().until_masked()
    survivors = (0, 1, 2, 3, 4, 5)
    for name in federation.names[:6]:
        federation.sign(name, survivors)
    unmasking = federation.unmasking(survivors)
    for name in federation.names[:6]:
        state = federation.secretive(name)
        reveal = federation.reveal(name, unmasking)
        assert reveal.self_masks == tuple(pair[33:] for pair in state.shares[:6])
        assert reveal.masking_keys == (state.shares[6][:33],)
    # c06 sent its vector, but the server said that it did not: its self-mask stays.
    for name in [*federation.names[:5], "c06"]:
        hidden = federation.uncovered(name, ["c05"])
        assert hidden != federation.values[name].tolist()


def test_the_adversarys_arithmetic_does_uncover_a_victim_whose_masks_are_all_known(federation):
    """Or else `assert_safe` would prove nothing."""
    others = federation.names[1:]
    assert federation.uncovered(VICTIM, others[:-2]) != federation.values[VICTIM].tolist()
    assert federation.uncovered(VICTIM, others) == federation.values[VICTIM].tolist()
    federation.until("sign", "reveal")
    assert federation.uncovered(VICTIM, others[:-2]) != federation.values[VICTIM].tolist()
    with pytest.raises(AssertionError):
        federation.assert_safe(OTHER)
