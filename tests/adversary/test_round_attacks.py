"""Bytes against bytes: a server that attacks its clients, and clients that attack a round.

The server has its own key, so what it signs is genuine; it may say anything. Each attack on a
client is tried just before the honest request: it must be refused by a typed error, leave no trace
in the client's store, and the honest round must end as if it had not been.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_bytes import other_spellings, spoiled, varint
from unit.round.masked_run import BIG, SIZES, STAGES, UPDATE, session_of

from fedtune.errors import (
    BadSignature,
    ContextMismatch,
    FedtuneError,
    JobError,
    MalformedMessage,
    ProtocolViolation,
    TooFewClients,
    WireError,
)
from fedtune.secagg import shamir
from fedtune.secagg.keys import SERVER, Identity
from fedtune.secagg.messages import MaskedValues, Reveal, SealedShares, Survivors, Unmasking
from fedtune.secagg.session import Session
from fedtune.types import RoundContext
from fedtune.wire import aggregation, codec
from fedtune.wire.envelope import Envelope, Kind, read_envelope, seal_envelope
from fedtune.wire.strict import serialize
from fedtune.wire.v1 import messages_pb2 as pb

# What one attack on one client is: the stage, whom, the honest request; gives hostile requests.
Attack = Callable[[Any, str, str, bytes], dict[str, bytes]]
REFUSALS = (MalformedMessage, BadSignature, ProtocolViolation, ContextMismatch)
ASKS = {
    "advertise": Kind.INVITE,
    "share": Kind.COHORT,
    "train": Kind.TRAIN_REQUEST,
    "sign": Kind.SURVIVORS,
    "reveal": Kind.UNMASKING,
}


def _read(payload: bytes) -> Envelope:
    return read_envelope(payload, BIG)


def _raw(envelope: Envelope, version: int = 1, **changes: Any) -> bytes:
    """An envelope as it is, whoever signed it."""
    changed = replace(envelope, **changes)
    return serialize(
        pb.Envelope(
            wire_version=version,
            kind=changed.kind,
            sender=changed.sender,
            session=changed.session,
            body=changed.body,
            signature=changed.signature,
        )
    )


def _signed(fed: Any, payload: bytes, signer: Identity | None = None, **changes: Any) -> bytes:
    """The envelope with `changes`, signed anew: by the server, or by `signer` under its name."""
    changed = replace(_read(payload), **changes)
    identity = signer or fed.authority.identity
    return seal_envelope(identity, changed.kind, changed.session, changed.body)


def _ask(fed: Any, name: str, stage: str, payload: bytes) -> bytes:
    machine = fed.machines[name]
    return machine.train(payload) if stage == "train" else machine.converse(payload)


def _refused(
    fed: Any, name: str, stage: str, payload: bytes, how: str, error: type[Exception] = WireError
) -> FedtuneError | None:
    """The client refuses, and remembers what it did before."""
    before, charged, replies = fed.kept(name), fed.charged(name), len(fed.trained)
    caught = _error_of(partial(_ask, fed, name, stage, payload))
    assert isinstance(caught, error), f"{how} at {stage}: {caught!r}"
    assert type(caught) in REFUSALS, how
    assert fed.kept(name) == before, how
    assert (fed.charged(name), len(fed.trained)) == (charged, replies), how
    return caught


def _error_of(action: Callable[[], object]) -> FedtuneError | None:
    """What an action raises, if it does; any other exception than ours is a failure."""
    try:
        action()
    except FedtuneError as error:
        return error
    return None


def _round_under(
    fed: Any, attack: Attack, error: type[Exception] = WireError, victims: int = 2
) -> dict[str, FedtuneError | None]:
    """A whole round in which the first clients are attacked at every stage; it ends as always."""
    refusals: dict[str, FedtuneError | None] = {}

    def before(name: str, stage: str, request: bytes) -> None:
        if name in fed.names[:victims]:
            for how, payload in attack(fed, name, stage, request).items():
                refusals[f"{stage}: {how}"] = _refused(fed, name, stage, payload, how, error)

    record = fed.round(before=before)
    assert record.clients == tuple(fed.names)
    assert record.failed == {}
    assert refusals
    return refusals


@pytest.fixture
def undisturbed(masked_federation) -> bytes:
    """The adapter after one round in peace."""
    fed = masked_federation(folder="peace")
    fed.round()
    return fed.adapter


# ------------------------------------------------------------- who signed, and under which name
def _other_signers(fed: Any, name: str, stage: str, request: bytes) -> dict[str, bytes]:
    envelope = _read(request)
    stranger = Identity.generate(SERVER)
    other = fed.sites.membership(fed.names[-1]).identity
    posing = Identity(SERVER, other.private_key)
    own = fed.sites.membership(name).identity
    return {
        "an unknown key": _signed(fed, request, stranger),
        "another client's key": _signed(fed, request, other),
        "another client's key as the server": _signed(fed, request, posing),
        "the client's own key": _signed(fed, request, own),
        "another sender": _raw(envelope, sender=fed.names[-1]),
        "an unknown sender": _raw(envelope, sender="mallory"),
        "no signature": _raw(envelope, signature=bytes(64)),
        "half a signature": _raw(envelope, signature=envelope.signature[:32]),
        "a flipped bit in the signature": _raw(
            envelope, signature=bytes([envelope.signature[0] ^ 1]) + envelope.signature[1:]
        ),
        # S + L: the same signature for a verifier that does not reduce (RFC 8032, 5.1.7).
        "the signature's other form": _raw(envelope, signature=_plus_order(envelope.signature)),
    }


def _plus_order(signature: bytes) -> bytes:
    order = 2**252 + 27742317777372353535851937790883648493
    shifted = int.from_bytes(signature[32:], "little") + order
    return signature[:32] + shifted.to_bytes(32, "little")


def test_only_the_servers_signature_counts(masked_federation, undisturbed):
    fed = masked_federation()
    refusals = _round_under(fed, _other_signers)
    assert {type(error) for error in refusals.values()} <= {
        BadSignature,
        ProtocolViolation,
        MalformedMessage,
    }
    assert fed.adapter == undisturbed


def _changed_after_signing(fed: Any, name: str, stage: str, request: bytes) -> dict[str, bytes]:
    envelope = _read(request)
    other_kinds = {f"kind {k.name}": _raw(envelope, kind=k) for k in Kind if k != envelope.kind}
    session = bytes([envelope.session[0] ^ 1]) + envelope.session[1:]
    found = {
        "another session": _raw(envelope, session=session),
        "no body": _raw(envelope, body=b""),
        **other_kinds,
    }
    for place in (0, len(envelope.body) // 2, len(envelope.body) - 1):
        body = bytearray(envelope.body)
        body[place] ^= 1
        found[f"byte {place} of the body"] = _raw(envelope, body=bytes(body))
    return found


def test_nothing_can_be_changed_after_signing(masked_federation, undisturbed):
    fed = masked_federation()
    _round_under(fed, _changed_after_signing)
    assert fed.adapter == undisturbed


# ---------------------------------------------------------------------- one form for one message
def _envelope_forms(fed: Any, name: str, stage: str, request: bytes) -> dict[str, bytes]:
    return {**other_spellings(request), **spoiled(request)}


def _body_forms(fed: Any, name: str, stage: str, request: bytes) -> dict[str, bytes]:
    body = _read(request).body
    forms = {**other_spellings(body), **spoiled(body)}
    if stage in ("share", "sign", "reveal"):
        # A list that is cut short is another message that a server may sign.
        forms = {how: other for how, other in forms.items() if not how.startswith("cut")}
    return {how: _signed(fed, request, body=other) for how, other in forms.items()}


@pytest.mark.parametrize("forms", [_envelope_forms, _body_forms])
def test_other_forms_of_the_same_message_are_malformed(masked_federation, undisturbed, forms):
    fed = masked_federation()
    refusals = _round_under(fed, forms, victims=1)
    assert len(refusals) > 5 * 18
    assert fed.adapter == undisturbed


def test_every_envelope_that_is_spelled_otherwise_is_malformed(masked_federation):
    fed = masked_federation()
    refusals = _round_under(fed, _envelope_forms, MalformedMessage, victims=1)
    kinds = {how.partition(": ")[2] for how in refusals}
    for how in (
        "last field first",
        "a tag that is too long",
        "a field twice",
        "field 1 as a long number",
        "field 5 with a long length",
        "very deep groups",
        "a length of 100 MB",
    ):
        assert how in kinds


def _unpacked_places(fed: Any, name: str, stage: str, request: bytes) -> dict[str, bytes]:
    """Lists of numbers have two spellings in protobuf: packed into one field, or one by one."""
    body = _read(request).body
    if stage == "sign":
        survivors = aggregation.decode_survivors(body, 99)
        places = survivors.places
        rest = b"".join(varint(2 << 3 | 2) + b"\x40" + item for item in survivors.vouchers)
    elif stage == "reveal":
        told = aggregation.decode_unmasking(body, 99)
        places = told.signers
        rest = b"".join(varint(2 << 3 | 2) + b"\x40" + item for item in told.signatures)
    else:
        return {}
    one_by_one = b"".join(varint(1 << 3) + varint(place) for place in places) + rest
    in_two = b"".join(
        varint(1 << 3 | 2) + varint(len(part)) + bytes(part) for part in (places[:2], places[2:])
    )
    return {
        "one by one": _signed(fed, request, body=one_by_one),
        "in two parts": _signed(fed, request, body=in_two + rest),
    }


def test_a_list_of_places_has_one_form(masked_federation, undisturbed):
    fed = masked_federation()
    assert len(_round_under(fed, _unpacked_places, MalformedMessage)) == 4
    assert fed.adapter == undisturbed


@pytest.mark.parametrize("version", [0, 2, 2**32 - 1])
def test_another_wire_version_is_malformed(masked_federation, version):
    def attack(fed: Any, name: str, stage: str, request: bytes) -> dict[str, bytes]:
        return {"version": _raw(_read(request), version)}

    assert len(_round_under(masked_federation(), attack, MalformedMessage)) == len(STAGES)


def _confused_kinds(fed: Any, name: str, stage: str, request: bytes) -> dict[str, bytes]:
    """Each body in an envelope of every other kind, genuinely signed by the server."""
    kind = _read(request).kind
    # Signers with signatures read like survivors with vouchers; of the set that it has signed
    # already, a client only says again what it said.
    known = {kind, Kind.SURVIVORS} if stage == "reveal" else {kind}
    found = {f"as {k.name}": _signed(fed, request, kind=k) for k in Kind if k not in known}
    for other, payload in fed.replies.items():
        if other[0] == name:
            found[f"own answer of {other[1]}"] = payload
            body = _read(payload).body
            found[f"own answer of {other[1]} signed"] = _signed(fed, request, body=body)
    return found


def test_no_message_passes_for_another(masked_federation, undisturbed):
    fed = masked_federation()
    _round_under(fed, _confused_kinds)
    assert fed.adapter == undisturbed


def test_a_request_at_the_wrong_door(masked_federation):
    """Requests to train sent as conversation, and the other way round."""
    fed = masked_federation()

    def before(name: str, stage: str, request: bytes) -> None:
        kept = fed.kept(name)
        machine = fed.machines[name]
        with pytest.raises((ProtocolViolation, MalformedMessage)):
            machine.converse(request) if stage == "train" else machine.train(request)
        assert fed.kept(name) == kept

    assert fed.round(before=before).clients == tuple(fed.names)


# ------------------------------------------------------------------------------------- replays
def test_requests_of_an_earlier_round_are_refused(masked_federation):
    fed = masked_federation()
    old: dict[str, dict[str, bytes]] = {name: {} for name in fed.names}

    def keep(name: str, stage: str, request: bytes) -> None:
        old[name][stage] = request

    fed.round(before=keep)

    answers = dict(fed.replies)

    def replay(_fed: Any, name: str, stage: str, _request: bytes) -> dict[str, bytes]:
        if stage == "train":
            return {"train": old[name]["train"]}
        if stage == "advertise":
            # It is still in round 1: what it has said there it says again, and nothing else.
            for then in ("sign", "reveal"):
                assert _ask(fed, name, then, old[name][then]) == answers[name, then]
            return {then: old[name][then] for then in ("advertise", "share")}
        return {then: old[name][then] for then in STAGES if then != "train"}

    assert {type(error) for error in _round_under(fed, replay).values()} == {ProtocolViolation}


def test_requests_of_an_earlier_attempt_are_refused(masked_federation, undisturbed):
    fed = masked_federation()
    old: dict[str, dict[str, bytes]] = {name: {} for name in fed.names}
    opened, exchange = fed.federation.open_round()
    while exchange.stage != "sign":
        for name, request in exchange.requests.items():
            old[name][exchange.stage] = request
        fed.hold(opened, exchange)
        # The journal is not told: the server dies before it has sealed.
        if exchange.stage == "train":
            break
        exchange = opened.proceed()
    fed.restart_server()

    def replay(_fed: Any, name: str, stage: str, _request: bytes) -> dict[str, bytes]:
        if stage == "train":
            return {"train": old[name]["train"]}
        return {"advertise": old[name]["advertise"], "share": old[name]["share"]}

    _round_under(fed, replay, ProtocolViolation)
    assert fed.adapter == undisturbed


def test_requests_of_another_run_are_refused(masked_federation, undisturbed):
    """The same sites and the same server hold two runs; what one says is nothing in the other."""
    fed = masked_federation()
    other = masked_federation("seed=1", folder=".", run_id="other")
    assert other.authority.roster.digest == fed.authority.roster.digest
    heard: dict[tuple[str, str], bytes] = {}

    def keep(name: str, stage: str, request: bytes) -> None:
        heard[name, stage] = request

    other.round(before=keep)
    answers = dict(other.replies)
    done = {name: other.kept(name) for name in other.names}

    def replay(_fed: Any, name: str, stage: str, request: bytes) -> dict[str, bytes]:
        found = (
            {"as it was": heard[name, stage]} if stage in ("advertise", "share", "train") else {}
        )
        # Under this run's session and with a good signature, but with the other run's content.
        if stage not in ("advertise", "sign"):
            body = _read(heard[name, stage]).body
            found["signed for this run"] = _signed(fed, request, body=body)
        return found

    _round_under(fed, replay)
    assert fed.adapter == undisturbed
    # Late requests of the finished run get their one answer; it says nothing new.
    for stage in ("sign", "reveal"):
        assert (
            _ask(other, "client-0", stage, heard["client-0", stage]) == answers["client-0", stage]
        )
    assert {name: other.kept(name) for name in other.names} == done


def test_a_second_run_of_the_same_federation_is_refused(masked_federation):
    """The sums of two runs, one without the victim, would differ by its very update."""
    fed = masked_federation()
    other = masked_federation(run_id="other")
    assert other.config.digest == fed.config.digest
    fed.round()
    kept = {name: fed.kept(name) for name in fed.names}
    with pytest.raises(TooFewClients, match="no second one"):
        other.round()
    fed.restart_sites()
    with pytest.raises(TooFewClients, match="no second one"):
        other.round(gone={"client-0": "advertise"})
    assert other.trained == []
    assert {name: fed.kept(name) for name in fed.names} == kept
    assert fed.round().clients == tuple(fed.names)


@pytest.mark.parametrize("stage", ["train", "sign"])
def test_values_that_have_left_are_repeated_to_the_same_cohort_only(masked_federation, stage):
    """Or the same values would be in two sums: of all, and of a part of them."""
    fed = masked_federation("secagg.colluding=0.1", sizes=(7, 12, 5, 9, 4, 8, 6, 11, 10))
    opened, exchange = fed.open_until("train")
    fed.hold(opened, exchange, gone={"client-8": "train"})
    assert fed.kept("client-0").stage == "masked"
    trained = list(fed.trained)
    if stage == "sign":
        # The server has all that it needs to open this one, and hides that.
        opened.proceed()
        fed.journal._db.execute("UPDATE open_round SET sealed = NULL")
    fed.restart_server()
    # All but two of those who have answered, with one that has not: enough for a cohort.
    record = fed.round(gone={"client-6": "advertise", "client-7": "advertise"})
    assert record.clients == ()
    assert fed.adapter == fed.start.tobytes()
    assert "repeats them to no other" in fed.lost[0]
    assert fed.trained == trained
    assert {fed.kept(name).stage for name in fed.names[:6]} == {"advertised"}
    # The next round has values of its own.
    assert fed.round().clients == tuple(fed.names)


def test_values_that_have_left_are_repeated_to_all_who_have_them(masked_federation):
    fed = masked_federation(folder="killed")
    whole = masked_federation(folder="whole")
    whole.round()
    for _ in range(2):
        opened, exchange = fed.open_until("train")
        fed.hold(opened, exchange, gone={"client-4": "train"})
        fed.restart_server()
        fed.restart_sites()
    assert fed.round().clients == tuple(fed.names)
    assert fed.adapter == whole.adapter
    assert fed.lost == []


@pytest.mark.parametrize("stage", ["sign", "reveal"])
def test_after_the_answer_no_new_attempt_at_the_round(masked_federation, stage):
    fed = masked_federation()
    opened, _ = fed.open_until(stage, after=True)
    first = session_of(_first_exchange(fed))
    for attempt in (1, 2, 3, 2**32 - 1):
        session = replace(first, attempt=attempt)
        _refused(
            fed,
            "client-0",
            "advertise",
            _invite(fed, session),
            f"attempt {attempt}",
            ProtocolViolation,
        )
    fed.finish(opened, opened.proceed())


def _first_exchange(fed: Any) -> Any:
    """Another first exchange of the round that is open, of which the clients know nothing."""
    from fedtune.round.masked import MaskedRound

    context = replace(fed.federation._context, round=fed.federation.round + 1)
    members = list(fed.federation.members)
    size = fed.small.attached.manifest.size
    opened = MaskedRound(
        context, members, fed.config, size, 1, fed.authority, lambda: None, lambda _: None
    )
    return opened.begin(fed.federation.adapter)


def _invite(fed: Any, session: Session, digest: bytes | None = None) -> bytes:
    """An invitation to any session, signed by the server."""
    identity = fed.authority.identity
    body = aggregation.encode_invite(session)
    return seal_envelope(identity, Kind.INVITE, digest or session.digest, body)


# --------------------------------------------------------------------------------- invitations
def _context(session: Session, **changes: Any) -> Session:
    return replace(session, context=replace(session.context, **changes))


def test_invitations_that_are_refused(masked_federation, undisturbed):
    fed = masked_federation()

    def attack(_fed: Any, _name: str, stage: str, request: bytes) -> dict[str, bytes]:
        if stage != "advertise":
            return {}
        good = aggregation.decode_invite(_read(request).body)
        wrong = {
            "round 0": _context(good, round=0),
            "a round beyond the last": _context(good, round=4),
            "the largest round": _context(good, round=2**32 - 1),
            "another base": _context(good, base_digest="cd" * 32),
            "another manifest": _context(good, manifest_digest="cd" * 32),
            "another configuration": _context(good, config_digest="cd" * 32),
            "another roster": replace(good, roster_digest=bytes(32)),
            "attempt 0": replace(good, attempt=0),
        }
        found = {how: _invite(fed, session) for how, session in wrong.items()}
        found["the session of another round"] = _invite(fed, good, _context(good, round=2).digest)
        found["the session of another run"] = _invite(fed, good, _context(good, run_id="x").digest)
        later = replace(good, attempt=good.attempt + 1)
        found["the session of another attempt"] = _invite(fed, good, later.digest)
        short = pb.Invite()
        short.ParseFromString(_read(request).body)
        short.roster_digest = short.roster_digest[:31]
        found["a short digest"] = _signed(fed, request, body=serialize(short))
        return found

    refusals = _round_under(fed, attack)
    for how in ("base", "manifest", "configuration", "roster"):
        assert type(refusals[f"advertise: another {how}"]) is ContextMismatch
    assert type(refusals["advertise: attempt 0"]) is MalformedMessage
    assert fed.adapter == undisturbed


def test_a_later_attempt_ends_the_earlier_one(masked_federation):
    """What was true of attempt 1 is refused once attempt 2 has begun, at whatever stage."""
    fed = masked_federation()
    for stage in STAGES[1:4]:
        opened, exchange = fed.open_until(stage)
        session = session_of(_first_exchange(fed))
        later = replace(session, attempt=fed.kept("client-0").attempt + 1)
        if stage == "sign":
            fed.machines["client-0"].converse(_invite(fed, later))
            _refused(
                fed, "client-0", stage, exchange.requests["client-0"], "sign", ProtocolViolation
            )
            fed.hold(opened, exchange, gone={"client-0": "sign"})
            record = fed.finish(opened, opened.proceed(), gone={"client-0": "sign"})
            assert record.clients == tuple(fed.names)
        else:
            fed.machines["client-0"].converse(_invite(fed, later))
            request = exchange.requests["client-0"]
            _refused(fed, "client-0", stage, request, "an old request", ProtocolViolation)
            fed.federation._journal.next_attempt(1)


# -------------------------------------------------------------------------------- the adapter
def _train_request(fed: Any, name: str, request: bytes, adapter: bytes) -> bytes:
    size = fed.start.nbytes
    _, delivery = aggregation.decode_train_request(_read(request).body, size, 99)
    return _signed(fed, request, body=aggregation.encode_train_request(adapter, delivery))


def test_an_adapter_that_others_did_not_get_is_refused(masked_federation, undisturbed):
    fed = masked_federation()

    def attack(_fed: Any, name: str, stage: str, request: bytes) -> dict[str, bytes]:
        if stage != "train":
            return {}
        honest = np.frombuffer(fed.adapter, "<f4")
        found = {}
        for how, value in (
            ("another value", 1.0),
            ("nan", np.nan),
            ("infinite", np.inf),
            ("negative zero", -0.0),
            ("denormal", 1e-42),
        ):
            other = honest.copy()
            other[3] = value
            found[how] = _train_request(fed, name, request, other.astype("<f4").tobytes())
        for how, data in (
            ("one value less", fed.adapter[:-4]),
            ("one value more", fed.adapter + bytes(4)),
            ("one byte less", fed.adapter[:-1]),
            ("nothing", b""),
        ):
            found[how] = _train_request(fed, name, request, data)
        return found

    refusals = _round_under(fed, attack)
    assert type(refusals["train: another value"]) is ContextMismatch
    assert type(refusals["train: one value less"]) is MalformedMessage
    assert fed.adapter == undisturbed


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_adapter_that_all_were_invited_to_must_be_finite(masked_federation, value):
    """The digest is right and the same for all; the values are not numbers to train from."""
    fed = masked_federation()
    state = type(fed.federation._state)
    adapter = fed.start.copy()
    adapter[5] = value
    fed.federation._state = state(adapter, {})
    opened, exchange = fed.open_until("train")
    for name, request in exchange.requests.items():
        _refused(fed, name, "train", request, "not finite", MalformedMessage)
        opened.fail(name, "refused")
    with pytest.raises(TooFewClients):
        opened.proceed()
    assert set(fed.stages().values()) == {"shared"}


def test_the_smallest_numbers_are_numbers(masked_federation):
    fed = masked_federation()
    adapter = fed.start.copy()
    adapter[:4] = [1e-45, -1e-45, 1e-40, -0.0]
    fed.federation._state = type(fed.federation._state)(adapter, {})
    assert fed.round().clients == tuple(fed.names)


def test_a_request_in_the_clear_to_a_masking_client(masked_federation, undisturbed):
    fed = masked_federation()

    def attack(_fed: Any, _name: str, stage: str, request: bytes) -> dict[str, bytes]:
        if stage != "train":
            return {}
        context = RoundContext(
            "run", 1, "ab" * 32, fed.small.attached.manifest.digest, fed.config.digest
        )
        plain = codec.encode_train_request(codec.TrainRequest(context, fed.adapter))
        kind = Kind.TRAIN_REQUEST
        session = _read(request).session
        return {
            "in the clear": plain,
            "in the clear, signed": seal_envelope(fed.authority.identity, kind, session, plain),
            "to evaluate": codec.encode_evaluate_request(
                codec.EvaluateRequest(context, fed.adapter)
            ),
        }

    _round_under(fed, attack, MalformedMessage)
    assert fed.adapter == undisturbed


def test_a_masked_conversation_with_a_client_in_the_clear(masked_federation):
    fed = masked_federation()
    plain = masked_federation(base=UPDATE, folder="plain")
    _, exchange = fed.federation.open_round()
    with pytest.raises(ProtocolViolation):
        plain.machines["client-0"].converse(exchange.requests["client-0"])


# ------------------------------------------------------------------------ signatures and reveals
def test_to_reveal_takes_enough_signatures_on_what_was_signed(masked_federation, undisturbed):
    fed = masked_federation()

    def attack(_fed: Any, name: str, stage: str, request: bytes) -> dict[str, bytes]:
        if stage != "reveal":
            return {}
        told = aggregation.decode_unmasking(_read(request).body, 99)

        def other(signers: tuple[int, ...], signatures: tuple[bytes, ...]) -> bytes:
            body = aggregation.encode_unmasking(Unmasking(signers, signatures))
            return _signed(fed, request, body=body)

        signers, signatures = told.signers, told.signatures
        return {
            "no signature": other((), ()),
            "one too few": other(signers[:4], signatures[:4]),
            "one of them twice": other(
                (*signers[:5], signers[4]), (*signatures[:5], signatures[4])
            ),
            "two exchanged": other(signers, (signatures[1], signatures[0], *signatures[2:])),
            "a wrong one": other(signers, (*signatures[:-1], bytes(64))),
            "a short one": other(signers, (*signatures[:-1], signatures[-1][:-1])),
            "one signature missing": other(signers, signatures[:-1]),
            "another order": other(signers[::-1], signatures[::-1]),
            "a place beyond": other((*signers[:-1], 6), signatures),
            "a huge place": other((*signers[:-1], 2**32 - 1), signatures),
        }

    _round_under(fed, attack)
    assert fed.adapter == undisturbed


def test_a_request_to_reveal_before_it_has_signed(masked_federation):
    fed = masked_federation()
    opened, exchange = fed.open_until("sign")
    late = "client-5"
    fed.hold(opened, exchange, gone={late: "sign"})
    following = opened.proceed()
    # A genuine request, for a survivor set that this client was never asked to sign.
    _refused(fed, late, "reveal", following.requests["client-0"], "unsigned", ProtocolViolation)
    assert fed.kept(late).stage == "masked"
    assert fed.finish(opened, following).clients == tuple(fed.names)


def _survivors(fed: Any, request: bytes, places: tuple[int, ...]) -> bytes:
    """The request to sign `places`, each with its own voucher where there is one."""
    told = aggregation.decode_survivors(_read(request).body, 99)
    vouchers = dict(zip(told.places, told.vouchers, strict=True))
    survivors = Survivors(places, tuple(vouchers.get(p, told.vouchers[0]) for p in places))
    return _signed(fed, request, body=aggregation.encode_survivors(survivors))


def test_no_second_survivor_set(masked_federation, undisturbed):
    fed = masked_federation()
    opened, exchange = fed.open_until("sign")
    sets = [(0, 1, 2, 3, 4), (0, 1, 2, 3, 5), (0, 2, 3, 4, 5)]
    for name, request in exchange.requests.items():
        opened.receive(name, fed.answer(name, "sign", request))
        for places in sets:
            payload = _survivors(fed, request, places)
            _refused(fed, name, "sign", payload, str(places), ProtocolViolation)
    fed.finish(opened, opened.proceed())
    assert fed.adapter == undisturbed


@pytest.mark.parametrize(
    "places",
    [
        (),
        (0,),
        (0, 1, 2, 3),  # below the threshold
        (1, 2, 3, 4, 5),  # without the one that is asked
        (0, 1, 2, 3, 4, 6),
        (0, 1, 2, 3, 4, 2**32 - 1),
        (0, 0, 1, 2, 3, 4),
        (5, 4, 3, 2, 1, 0),
    ],
)
def test_survivor_sets_that_nobody_signs(masked_federation, places):
    fed = masked_federation()
    opened, exchange = fed.open_until("sign")
    payload = _survivors(fed, exchange.requests["client-0"], places)
    _refused(fed, "client-0", "sign", payload, str(places))
    assert fed.kept("client-0").stage == "masked"
    assert fed.finish(opened, exchange).clients == tuple(fed.names)


def test_two_survivor_sets_for_two_halves_open_nothing(masked_federation):
    """A server that tells some clients another set gets enough signatures for neither."""
    fed = masked_federation()
    _, exchange = fed.open_until("sign")
    sets = {"all": (0, 1, 2, 3, 4, 5), "but the last": (0, 1, 2, 3, 4)}
    signed: dict[str, dict[int, bytes]] = {how: {} for how in sets}
    for place, name in enumerate(fed.names):
        how = "all" if place in (0, 1, 5) else "but the last"
        answer = fed.answer(name, "sign", _survivors(fed, exchange.requests[name], sets[how]))
        signed[how][place] = aggregation.decode_signature(_read(answer).body)
    for how, signatures in signed.items():
        told = Unmasking(tuple(signatures), tuple(signatures.values()))
        mixed = {**signed["all"], **signed["but the last"]}
        both = Unmasking(tuple(sorted(mixed)), tuple(mixed[p] for p in sorted(mixed)))
        for place in signatures:
            name = fed.names[place]
            for unmasking in (told, both):
                body = aggregation.encode_unmasking(unmasking)
                payload = _signed(fed, exchange.requests[name], kind=Kind.UNMASKING, body=body)
                _refused(fed, name, "reveal", payload, how)
    assert set(fed.stages().values()) == {"signed"}


def test_a_hello_in_between_disturbs_nothing(masked_federation, undisturbed):
    fed = masked_federation()
    said = []

    def before(name: str, _stage: str, _request: bytes) -> None:
        kept = fed.kept(name)
        said.append(fed.machines[name].hello(codec.encode_hello_request("run")))
        fed.machines[name].hello(codec.encode_hello_request("another"))
        assert fed.kept(name) == kept

    fed.round(before=before)
    assert fed.adapter == undisturbed
    assert len(set(said)) == 6
    # Under masks nobody says how many examples it has.
    assert {codec.decode_hello(payload).train_examples for payload in said} == {0}


# ------------------------------------------------------------------------------------- cohorts
def _adverts(fed: Any, request: bytes) -> list[Any]:
    return list(aggregation.decode_cohort(_read(request).body, 99))


def test_cohorts_that_are_refused(masked_federation, undisturbed):
    fed = masked_federation()

    def attack(_fed: Any, name: str, stage: str, request: bytes) -> dict[str, bytes]:
        if stage != "share":
            return {}
        adverts = _adverts(fed, request)
        place = fed.names.index(name)
        stranger = replace(adverts[-1], client="mallory")
        forged = replace(adverts[-1], masking_key=bytes(range(32)))
        others = [a for a in adverts if a.client != name]
        wrong = {
            "nobody": [],
            "two": adverts[:2],
            "without the one that is asked": others,
            "another order": adverts[::-1],
            "one twice": [*adverts, adverts[-1]],
            "a stranger": [*adverts, stranger],
            "a key that nobody signed": [*adverts[:-1], forged],
            "the server as a client": [replace(adverts[0], client=""), *adverts],
            "its own keys changed": [
                replace(a, commitment=bytes(32)) if p == place else a for p, a in enumerate(adverts)
            ],
            "a short key": [*adverts[:-1], replace(adverts[-1], sealing_key=b"short")],
        }
        return {
            how: _signed(fed, request, body=aggregation.encode_cohort(tuple(cohort)))
            for how, cohort in wrong.items()
        }

    _round_under(fed, attack)
    assert fed.adapter == undisturbed


def test_adverts_of_an_earlier_attempt_are_no_cohort(masked_federation):
    fed = masked_federation()
    _, old = fed.open_until("share")
    stale = _adverts(fed, old.requests["client-0"])
    fed.restart_server()
    opened, exchange = fed.open_until("share")
    for name, request in exchange.requests.items():
        fresh = _adverts(fed, request)
        mixed = [
            a if a.client in (name, "client-5") else b for a, b in zip(fresh, stale, strict=True)
        ]
        body = aggregation.encode_cohort(tuple(mixed))
        _refused(fed, name, "share", _signed(fed, request, body=body), "stale", BadSignature)
    assert fed.finish(opened, exchange).clients == tuple(fed.names)


# --------------------------------------------------------------------------------------- memory
def _refuses_in(mebibytes: int, ask: Callable[[bytes], object], payload: bytes) -> None:
    """In a child whose memory cannot grow by more: the payload is refused, by a typed error."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (mebibytes << 20), resource.RLIM_INFINITY))
    try:
        ask(payload)
    except WireError:
        os._exit(0)
    except BaseException:
        os._exit(9)
    os._exit(8)


@pytest.mark.parametrize("door", ["converse", "train", "hello", "evaluate"])
def test_memory_is_bounded_at_a_client(masked_federation, forked, door):
    fed = masked_federation()
    _, exchange = fed.federation.open_round()
    request = exchange.requests["client-0"]
    forms = spoiled(request)
    huge = seal_envelope(fed.authority.identity, Kind.COHORT, bytes(32), bytes(100_000_000))
    payloads = [forms["a length of 100 MB"], forms["a body of 100 MB"], huge]
    fed.close()
    for payload in payloads:

        def child(payload: bytes = payload) -> None:
            ask = getattr(fed.machines["client-0"], door)
            _refuses_in(24, ask, payload)

        assert forked(child) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_memory_is_bounded_at_the_server(masked_federation, forked, stage):
    fed = masked_federation()
    opened, exchange = fed.open_until(stage)
    session = _read(next(iter(exchange.requests.values()))).session
    identity = fed.sites.membership("client-0").identity
    kind = Kind(ASKS[stage] + 1)
    huge = seal_envelope(identity, kind, session, bytes(100_000_000))
    small = seal_envelope(identity, kind, session, b"")
    for payload in (huge, spoiled(small)["a body of 100 MB"]):

        def child(payload: bytes = payload) -> None:
            _refuses_in(24, lambda data: opened.receive("client-0", data), payload)

        assert forked(child) == 0
    assert fed.finish(opened, exchange).clients == tuple(fed.names)


# ----------------------------------------------------------------------- clients against a round
MALLORY = "client-2"
# A change of what mallory answers at a stage: the federation, the answer, the open request.
Change = Callable[[Any, bytes, bytes], bytes]


def _resign(fed: Any, payload: bytes, **changes: Any) -> bytes:
    return _signed(fed, payload, fed.sites.membership(MALLORY).identity, **changes)


def _body(read: Callable[[bytes], Any], change: Callable[[Any], bytes]) -> Change:
    def changed(fed: Any, payload: bytes, _request: bytes) -> bytes:
        return _resign(fed, payload, body=change(read(_read(payload).body)))

    return changed


def _advert(change: Callable[[Any], Any]) -> Change:
    return _body(aggregation.decode_advert, lambda a: aggregation.encode_advert(change(a)))


def _shares(change: Callable[[tuple[bytes, ...]], tuple[bytes, ...]]) -> Change:
    return _body(
        lambda body: aggregation.decode_sealed_shares(body, 99),
        lambda s: aggregation.encode_sealed_shares(SealedShares(change(s.sealed))),
    )


def _values(change: Callable[[bytes], bytes], seconds: float | None = None) -> Change:
    def read(body: bytes) -> Any:
        message = pb.MaskedUpdate()
        message.ParseFromString(body)
        return message

    return _body(
        read,
        lambda m: aggregation.encode_update(
            MaskedValues(change(m.values), m.voucher),
            m.train_seconds if seconds is None else seconds,
        ),
    )


def _reveal(change: Callable[[Reveal], Reveal]) -> Change:
    return _body(
        lambda body: aggregation.decode_reveal(body, 99),
        lambda r: aggregation.encode_reveal(change(r)),
    )


def _signature(change: Callable[[bytes], bytes]) -> Change:
    return _body(aggregation.decode_signature, lambda s: aggregation.encode_signature(change(s)))


def _same(payload: bytes) -> bytes:
    return payload


def _foreign_survivors(fed: Any, payload: bytes, _request: bytes) -> bytes:
    """A good signature on another survivor set."""
    from fedtune.secagg.messages import survivors_signed

    state = fed.kept(MALLORY).session
    message = survivors_signed(state.binding, state.sharers, (0, 1, 2, 3, 4))
    signature = fed.sites.membership(MALLORY).identity.sign(message)
    return _resign(fed, payload, body=aggregation.encode_signature(signature))


def _flip_padding(values: bytes) -> bytes:
    return values[:-1] + bytes([values[-1] | 0x80])


ANYWHERE: dict[str, Change] = {
    "another client's answer": lambda fed, _, __: _other_answer(fed),
    "the request sent back": lambda _, __, request: request,
    "signed by nobody": lambda _, p, __: _raw(_read(p), signature=bytes(64)),
    "signed by a stranger": lambda fed, p, _: _signed(fed, p, Identity.generate(MALLORY)),
    "signed by the server": lambda fed, p, _: _signed(fed, p),
    "in another's name": lambda fed, p, _: _raw(_read(p), sender="client-0"),
    "of another session": lambda fed, p, _: _resign(fed, p, session=bytes(32)),
    "wire version 2": lambda _, p, __: _raw(_read(p), 2),
    "of the next kind": lambda fed, p, _: _resign(fed, p, kind=Kind(_read(p).kind % 10 + 1)),
    "a reveal": lambda fed, p, _: _resign(fed, p, kind=Kind.REVEAL, body=b""),
    "an empty body": lambda fed, p, _: _resign(fed, p, body=b""),
    "trailing bytes": lambda _, p, __: p + b"\0",
    "a body with more": lambda fed, p, _: _resign(fed, p, body=_read(p).body + b"\0"),
    "a body with an unknown field": lambda fed, p, _: _resign(
        fed, p, body=_read(p).body + varint(31 << 3 | 2) + b"\0"
    ),
    "a body of deep groups": lambda fed, p, _: _resign(
        fed, p, body=spoiled(_read(p).body)["deep groups"]
    ),
    "nothing": lambda _, __, ___: b"",
}
_IN_ITS_NAME: dict[str, Change] = {
    "another client's answer under its own name": lambda fed, p, _: _resign(
        fed, p, body=_read(_other_answer(fed)).body
    )
}
# By stage: only what a client could send there and another check than above must refuse.
PARTICULAR: dict[str, dict[str, Change]] = {
    "advertise": {
        **_IN_ITS_NAME,
        "another name": _advert(lambda a: replace(a, client="client-0")),
        "a name that is nobody's": _advert(lambda a: replace(a, client="mallory")),
        "the server's name": _advert(lambda a: replace(a, client="")),
        "another key than signed": _advert(lambda a: replace(a, masking_key=a.sealing_key)),
        "a short key": _advert(lambda a: replace(a, sealing_key=a.sealing_key[:31])),
        "no signature": _advert(lambda a: replace(a, signature=bytes(64))),
    },
    "share": {
        "one too few": _shares(lambda s: s[:-1]),
        "one too many": _shares(lambda s: (*s, s[-1])),
        "none": _shares(lambda _: ()),
        "a short one": _shares(lambda s: (s[0][:-1], *s[1:])),
        "a long one": _shares(lambda s: (s[0] + b"\0", *s[1:])),
    },
    "train": {
        "one byte more": _values(lambda v: v + b"\0"),
        "one byte less": _values(lambda v: v[:-1]),
        "one bit too many": _values(_flip_padding),
        "no values": _values(lambda _: b""),
        "seconds that are no number": _values(_same, float("nan")),
        "negative seconds": _values(_same, -1.0),
        "endless seconds": _values(_same, float("inf")),
    },
    "sign": {
        **_IN_ITS_NAME,
        "a signature of zeros": _signature(lambda _: bytes(64)),
        "a short signature": _signature(lambda s: s[:-1]),
        "of another survivor set": _foreign_survivors,
    },
    "reveal": {
        "one share too few": _reveal(lambda r: Reveal(r.self_masks[:-1], r.masking_keys)),
        "one share too many": _reveal(lambda r: Reveal((*r.self_masks, bytes(33)), r.masking_keys)),
        "masking keys of survivors": _reveal(lambda r: Reveal((), r.self_masks)),
        "a short share": _reveal(lambda r: Reveal((r.self_masks[0][:-1], *r.self_masks[1:]), ())),
        "a share above the prime": _reveal(
            lambda r: Reveal((b"\xff" * 33, *r.self_masks[1:]), r.masking_keys)
        ),
    },
}


def _other_answer(fed: Any) -> bytes:
    stage = max((s for n, s in fed.replies if n == MALLORY), key=STAGES.index)
    payload: bytes = fed.replies["client-1", stage]
    return payload


@pytest.mark.parametrize("stage", STAGES)
def test_a_client_that_answers_wrongly_is_left_out_and_the_others_finish(masked_federation, stage):
    fed = masked_federation(folder="attacked")
    refusals: list[str] = []
    opened, exchange = fed.open_until(stage)
    for name, request in exchange.requests.items():
        reply = fed.answer(name, stage, request)
        if name != MALLORY:
            opened.receive(name, reply)
            continue
        for how, change in {**ANYWHERE, **PARTICULAR[stage]}.items():
            payload = change(fed, reply, request)
            pending, up = opened.pending, opened.bytes_up
            caught = _error_of(partial(opened.receive, name, payload))
            assert type(caught) in REFUSALS, f"the server took {how}"
            refusals.append(how)
            assert (opened.pending, opened.bytes_up) == (pending, up), how
        opened.fail(name, "nothing acceptable")
    record = fed.finish(opened, opened.proceed())
    counted = stage in ("sign", "reveal")
    assert record.clients == tuple(n for n in fed.names if n != MALLORY or counted)
    assert len(refusals) == len(ANYWHERE) + len(PARTICULAR[stage])
    plain = masked_federation(base=UPDATE, folder="plain")
    plain.round(gone={} if counted else {MALLORY: "train"})
    assert fed.adapter == plain.adapter


@pytest.mark.parametrize("stage", STAGES)
def test_after_all_refusals_the_honest_answer_still_counts(masked_federation, undisturbed, stage):
    fed = masked_federation()
    opened, exchange = fed.open_until(stage)
    for name, request in exchange.requests.items():
        reply = fed.answer(name, stage, request)
        if name == MALLORY:
            for change in (*ANYWHERE.values(), *PARTICULAR[stage].values()):
                with pytest.raises(WireError):
                    opened.receive(name, change(fed, reply, request))
        opened.receive(name, reply)
    assert fed.finish(opened, opened.proceed()).clients == tuple(fed.names)
    assert fed.adapter == undisturbed


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_answer_and_an_uninvited_one(masked_federation, undisturbed, stage):
    fed = masked_federation("rounds.clients-per-round=6", sizes=(*SIZES, 6))
    opened, exchange = fed.open_until(stage)
    [outsider] = set(fed.names) - {member.name for member in opened.cohort}
    session = _read(next(iter(exchange.requests.values()))).session
    identity = fed.sites.membership(outsider).identity
    for name, request in exchange.requests.items():
        reply = fed.answer(name, stage, request)
        envelope = _read(reply)
        uninvited = seal_envelope(identity, envelope.kind, session, envelope.body)
        for sender, payload in (
            (outsider, uninvited),
            (outsider, reply),
            ("nobody", reply),
            ("", reply),
            (name, uninvited),
        ):
            with pytest.raises(WireError):
                opened.receive(sender, payload)
        opened.receive(name, reply)
        up = opened.bytes_up
        with pytest.raises(WireError):
            opened.receive(name, reply)
        assert opened.bytes_up == up
    record = fed.finish(opened, opened.proceed())
    assert record.clients == tuple(member.name for member in opened.cohort)
    assert outsider not in fed.stages()


def test_a_client_that_reveals_other_shares_stops_nothing(masked_federation, undisturbed):
    fed = masked_federation()
    change = _reveal(
        lambda r: Reveal(tuple(bytes([share[0] ^ 1]) + share[1:] for share in r.self_masks), ())
    )

    def tamper(name: str, stage: str, reply: bytes) -> bytes:
        lies = stage == "reveal" and name == MALLORY
        return change(fed, reply, b"") if lies else reply

    assert fed.round(tamper=tamper).clients == tuple(fed.names)
    assert fed.adapter == undisturbed


def test_a_client_whose_sealed_shares_do_not_open_is_named(masked_federation):
    """Nobody trains with it: the round ends, says why, and reveals nothing."""
    fed = masked_federation()
    change = _shares(lambda shares: tuple(bytes([s[0] ^ 1]) + s[1:] for s in shares))

    def tamper(name: str, stage: str, reply: bytes) -> bytes:
        return change(fed, reply, b"") if (name, stage) == (MALLORY, "share") else reply

    with pytest.raises(TooFewClients, match="BadSignature"):
        fed.round(tamper=tamper)
    assert not {"masked", "signed", "revealed"} & (
        set(fed.stages().values()) - {fed.kept(MALLORY).stage}
    )
    # Without its lies, or without it, the next attempt succeeds.
    assert fed.round(gone={MALLORY: "advertise"}).failed.keys() == {MALLORY}


def _poison(fed: Any) -> Callable[[str, str, bytes], bytes]:
    """One client sends anything instead of its masked vector."""

    def tamper(name: str, stage: str, reply: bytes) -> bytes:
        if (name, stage) != (MALLORY, "train"):
            return reply
        return _values(lambda v: bytes(len(v)))(fed, reply, b"")

    return tamper


def test_values_beyond_all_bounds_are_found_in_the_sum(masked_federation):
    """The round comes to nothing, and the run goes on; not for ever, if it happens each time."""
    fed = masked_federation("rounds.count=9")
    record = fed.round(tamper=_poison(fed))
    assert "not one that clients can give" in fed.lost[0]
    assert (record.round, record.clients, record.train_loss) == (1, (), None)
    assert fed.adapter == fed.start.tobytes()
    fed.restart_server()
    assert fed.round().clients == tuple(fed.names)
    after = fed.adapter
    fed.round(tamper=_poison(fed))
    fed.round(tamper=_poison(fed))
    with pytest.raises(JobError, match="3 rounds in a row"):
        fed.round(tamper=_poison(fed))
    assert fed.adapter == after
    assert [bool(record.clients) for record in fed.journal.records()] == [False, True, False, False]


def test_a_dealer_of_wrong_shares_is_named(masked_federation):
    """Each share is one, and opens; together they give back nothing that was committed to."""
    fed = masked_federation()
    honest = shamir.split

    def dealt(secret: bytes, threshold: int, clients: int) -> list[bytes]:
        return honest(bytes(len(secret)), threshold, clients)

    def before(name: str, stage: str, _request: bytes) -> None:
        lies = (name, stage) == (MALLORY, "share")
        monkeypatch.setattr(shamir, "split", dealt if lies else honest)

    with pytest.MonkeyPatch.context() as monkeypatch:
        record = fed.round(before=before)
    assert record.clients == ()
    assert f"the secrets of {MALLORY}" in fed.lost[0]
    assert fed.adapter == fed.start.tobytes()
    assert fed.round().clients == tuple(fed.names)
