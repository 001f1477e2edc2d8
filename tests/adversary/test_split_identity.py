"""Who may use a base model: nobody without a key of the roster, nobody on the network."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from split_raw import Ended, a_request, member, raw_client
from split_service import HOST, Held, Parties, serving, some_examples

from fedtune.base.answering import AnsweringDecoder
from fedtune.config import Limits
from fedtune.deploy.keys import make_server_keys
from fedtune.errors import BaseRefused, BaseUnreachable, ConfigError, KeyFileError
from fedtune.secagg.keys import SERVER, Identity, Roster
from fedtune.secagg.transcript import transcript
from fedtune.split.address import SERVICE
from fedtune.split.client import GrpcBase, Patience
from fedtune.split.introduction import introduce
from fedtune.split.server import SplitServer
from fedtune.train.channel import Meter
from fedtune.wire.split import Introduction, Terms, Welcome
from fedtune.wire.v1 import split_pb2 as pb

BRIEF = Patience(total=1.0, connect=1.0)
REFUSED = grpc.StatusCode.UNAUTHENTICATED


@pytest.fixture(scope="module")
def parties() -> Parties:
    return Parties.make("clinic", "other")


@pytest.fixture(scope="module")
def server(decoder: AnsweringDecoder, parties: Parties, split_keys: Path) -> Iterator[SplitServer]:
    """With TLS."""
    with serving(decoder, parties.roster, keys=split_keys) as found:
        yield found


@pytest.fixture(scope="module")
def authority(split_keys: Path) -> bytes:
    return (split_keys / "ca.crt").read_bytes()


def _use(base: GrpcBase, terms: Terms) -> np.ndarray:
    with base:
        return base.outputs(*some_examples(1, 3, terms.width)[:2])


def test_who_is_in_the_roster_is_let_in(
    server: SplitServer, parties: Parties, terms: Terms, authority: bytes
) -> None:
    for name in parties.identities:
        found = _use(parties.base(name, server.port, terms, authority), terms)
        assert found.shape == (3, 5)


@pytest.mark.parametrize("who", ["nobody", "a wrong key"])
def test_who_is_not_is_told_what_to_do(
    server: SplitServer, parties: Parties, terms: Terms, authority: bytes, who: str
) -> None:
    identity = Identity.generate("stranger" if who == "nobody" else "clinic")
    base = GrpcBase(f"{HOST}:{server.port}", authority, identity, parties.roster, terms, Meter())
    # Both in the same words: a stranger does not learn who is in the roster.
    words = f"no client '{identity.name}' with this key in its roster; is public.toml with the"
    with pytest.raises(BaseRefused, match=words):
        _use(base, terms)


def test_a_signature_is_good_for_one_stream(
    server: SplitServer, parties: Parties, terms: Terms, authority: bytes
) -> None:
    identity = parties.identities["clinic"]
    with (
        raw_client(server.port, authority=authority) as first,
        raw_client(server.port, authority=authority) as second,
    ):
        introduction = introduce(identity, parties.roster, terms, first.open())
        second.open()
        second.say(introduction)
        with pytest.raises(Ended) as found:
            second.hear()
        assert found.value.code == REFUSED
        first.say(introduction)
        assert isinstance(first.hear(), Welcome)


def test_a_signature_for_another_name_or_purpose_is_refused(
    server: SplitServer, parties: Parties, terms: Terms, authority: bytes
) -> None:
    identity = parties.identities["clinic"]
    for how in ("another name", "another purpose", "the nonce alone", "the server's name"):
        with raw_client(server.port, authority=authority) as raw:
            challenge = raw.open()
            good = introduce(identity, parties.roster, terms, challenge)
            name, signature = good.name, good.signature
            if how == "another name":
                name = "other"
            elif how == "another purpose":
                fields = (challenge.nonce, b"clinic", good.roster_digest, good.terms_digest)
                signature = identity.sign(transcript("envelope", fields))
            elif how == "the nonce alone":
                signature = identity.sign(challenge.nonce)
            else:
                name = SERVER
            raw.say(Introduction(name, good.roster_digest, good.terms_digest, signature))
            with pytest.raises(Ended) as found:
                raw.hear()
            expected = grpc.StatusCode.INVALID_ARGUMENT if name == SERVER else REFUSED
            assert found.value.code == expected, how


def test_a_signature_for_another_server_is_of_no_use(
    server: SplitServer, parties: Parties, terms: Terms, authority: bytes
) -> None:
    """Another server, which the client trusts too, passes a challenge on to it."""
    identity = parties.identities["clinic"]
    public = {**parties.roster.keys, SERVER: Identity.generate(SERVER).public_key}
    other_terms = Terms("cd" * 32, *list(vars(terms).values())[1:7])
    for roster, agreed in ((Roster(public), terms), (parties.roster, other_terms)):
        with raw_client(server.port, authority=authority) as relay:
            relayed = introduce(identity, roster, agreed, relay.open())
            relay.say(relayed)
            with pytest.raises(Ended) as found:
                relay.hear()
            assert found.value.code == grpc.StatusCode.FAILED_PRECONDITION
        # Nor if it says that it was signed for this one.
        with raw_client(server.port, authority=authority) as relay:
            relayed = introduce(identity, roster, agreed, relay.open())
            right = (parties.roster.digest, terms.digest)
            relay.say(Introduction(relayed.name, *right, relayed.signature))
            with pytest.raises(Ended) as found:
                relay.hear()
            assert found.value.code == REFUSED


def test_another_roster_is_said_so(
    server: SplitServer, parties: Parties, terms: Terms, authority: bytes
) -> None:
    identity = parties.identities["clinic"]
    roster = Roster({**parties.roster.keys, "new": Identity.generate("new").public_key})
    base = GrpcBase(f"{HOST}:{server.port}", authority, identity, roster, terms, Meter())
    with pytest.raises(BaseRefused, match="different rosters"):
        _use(base, terms)


@pytest.mark.parametrize("first", ["a request", "nothing", "half"])
def test_nothing_is_computed_for_who_is_not_introduced(
    decoder: AnsweringDecoder, parties: Parties, terms: Terms, first: str
) -> None:
    held = Held(decoder)
    with (
        serving(held, parties.roster, limits=Limits(handshake=0.3)) as server,
        raw_client(server.port) as raw,
    ):
        raw.open()
        if first == "a request":
            raw.say(a_request(terms))
        if first == "half":
            raw.done()
        with pytest.raises(Ended) as found:
            raw.hear()
    codes = {
        "a request": grpc.StatusCode.INVALID_ARGUMENT,
        "half": grpc.StatusCode.INVALID_ARGUMENT,
        "nothing": grpc.StatusCode.DEADLINE_EXCEEDED,
    }
    assert found.value.code == codes[first]
    assert held.rows == []


def test_one_introduction_is_enough(
    decoder: AnsweringDecoder, parties: Parties, terms: Terms
) -> None:
    with serving(decoder, parties.roster) as server, raw_client(server.port) as raw:
        identity = parties.identities["clinic"]
        introduction = introduce(identity, parties.roster, terms, raw.open())
        raw.say(introduction)
        assert isinstance(raw.hear(), Welcome)
        raw.say(introduction)
        with pytest.raises(Ended) as found:
            raw.hear()
    assert found.value.code == grpc.StatusCode.INVALID_ARGUMENT


def test_two_processes_with_one_key_are_told_so(
    decoder: AnsweringDecoder, parties: Parties, terms: Terms
) -> None:
    with (
        serving(decoder, parties.roster) as server,
        parties.base("clinic", server.port, terms) as first,
        parties.base("clinic", server.port, terms) as second,
    ):
        for base in (first, second):
            base.outputs(*some_examples(1, 3, terms.width)[:2])
        with pytest.raises(BaseRefused, match="another process has introduced itself as 'clinic'"):
            first.outputs(*some_examples(1, 3, terms.width)[:2])
        second.outputs(*some_examples(1, 3, terms.width)[:2])


def test_another_authority_is_refused(
    server: SplitServer, parties: Parties, terms: Terms, tmp_path: Path
) -> None:
    make_server_keys(tmp_path / "keys", [HOST])
    other = (tmp_path / "keys" / "ca.crt").read_bytes()
    with pytest.raises(BaseRefused, match=r"certificate.*needs the ca\.crt of this federation"):
        _use(parties.base("clinic", server.port, terms, other), terms)


def test_a_certificate_for_another_host_is_refused(
    decoder: AnsweringDecoder, parties: Parties, terms: Terms, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    make_server_keys(keys, ["fedtune.example.org"])
    authority = (keys / "ca.crt").read_bytes()
    with serving(decoder, parties.roster, keys=keys) as server:
        base = parties.base("clinic", server.port, terms, authority)
        with pytest.raises(BaseRefused, match="an address that its certificate names"):
            _use(base, terms)


@pytest.mark.parametrize("tls", ["only at the server", "only at the client"])
def test_nobody_speaks_without_tls_to_who_wants_it(
    decoder: AnsweringDecoder,
    parties: Parties,
    terms: Terms,
    split_keys: Path,
    authority: bytes,
    tls: str,
) -> None:
    at_server = tls == "only at the server"
    theirs = None if at_server else authority
    with serving(decoder, parties.roster, keys=split_keys if at_server else None) as server:
        base = parties.base("clinic", server.port, terms, theirs, patience=BRIEF)
        with pytest.raises(BaseUnreachable):
            _use(base, terms)


@pytest.mark.parametrize("host", ["0.0.0.0", "fedtune.example.org", "192.0.2.1", "::"])
def test_without_tls_there_is_only_this_machine(
    decoder: AnsweringDecoder, parties: Parties, terms: Terms, host: str
) -> None:
    with pytest.raises(ConfigError, match="without TLS"):
        SplitServer(decoder, terms, parties.roster, host, 0, None)
    address = f"[{host}]:1" if ":" in host else f"{host}:1"
    identity = parties.identities["clinic"]
    with pytest.raises(ConfigError, match="without TLS"):
        GrpcBase(address, None, identity, parties.roster, terms, Meter())


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:x", "host:70000", "a b:1:2"])
def test_what_is_no_address(parties: Parties, terms: Terms, address: str) -> None:
    with pytest.raises(ConfigError):
        GrpcBase(address, b"", parties.identities["clinic"], parties.roster, terms, Meter())


def test_what_is_no_certificate(parties: Parties, terms: Terms) -> None:
    pem = b"-----BEGIN CERTIFICATE-----\n" + base64.b64encode(b"nonsense") + b"\n"
    for authority in (b"", b"\xff", pem):
        with pytest.raises(KeyFileError):
            parties.base("clinic", 1, terms, authority)


def test_another_wire_version_is_told_what_to_do(server: SplitServer, authority: bytes) -> None:
    with raw_client(server.port, authority=authority) as raw:
        describe = raw.channel.unary_unary(f"/{SERVICE}/Describe")
        with pytest.raises(grpc.RpcError) as found:
            describe(pb.DescribeRequest(wire_version=2).SerializeToString())
    assert found.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "install the same fedtune" in found.value.details()


def test_strangers_do_not_keep_members_out(
    decoder: AnsweringDecoder, parties: Parties, terms: Terms
) -> None:
    with (
        serving(decoder, parties.roster, limits=Limits(strangers=2, handshake=60.0)) as server,
        raw_client(server.port) as one,
        raw_client(server.port) as two,
    ):
        one.open()
        two.open()
        with member(server.port, parties, "clinic", terms) as raw:
            raw.say(a_request(terms))
            assert raw.hear().number == 1
        with pytest.raises(Ended) as found:
            one.hear()
        assert found.value.code == grpc.StatusCode.UNAVAILABLE
