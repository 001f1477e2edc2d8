"""What a registered client can send to a base model, and a base model's server to a client."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from adversary.hostile_bytes import other_spellings, spoiled
from split_raw import Ended, a_request, member
from split_service import FEDERATION, Held, Parties, load_decoder, serving, some_examples

from fedtune.errors import MalformedMessage, TrainingError
from fedtune.split.server import SplitServer, terms_of
from fedtune.train.activations import ENCODINGS, Encoding
from fedtune.train.channel import Channel, Meter
from fedtune.wire.split import (
    Answer,
    Challenge,
    Kind,
    Reason,
    Refusal,
    Request,
    Terms,
    Upstream,
    Welcome,
    decode_from_client,
    decode_from_server,
    encode_from_client,
    encode_from_server,
)
from fedtune.wire.v1 import split_pb2 as pb

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def held(tiny_decoder: Path) -> Held:
    return Held(load_decoder(tiny_decoder))


@pytest.fixture(scope="module")
def parties() -> Parties:
    return Parties.make("malicious", "honest")


@pytest.fixture(scope="module")
def server(held: Held, parties: Parties) -> Iterator[SplitServer]:
    with serving(held, parties.roster) as found:
        yield found


@pytest.fixture(scope="module")
def terms(held: Held) -> Terms:
    return terms_of(held, FEDERATION, "float32")


def _refused(server: SplitServer, parties: Parties, terms: Terms, *said: Any) -> Ended:
    """How a stream ends on which all of this is said; the server goes on for others."""
    with member(server.port, parties, "malicious", terms) as raw:
        for one in said:
            raw.say(one)
        ended = raw.end()
    with member(server.port, parties, "honest", terms) as raw:
        raw.say(a_request(terms, 1, Kind.DIFFERENTIATE))
        assert isinstance(raw.hear(), Answer)
    return ended


def _changed(request: Request, **fields: Any) -> bytes:
    """A request with fields that a `Request` cannot have."""
    message = pb.FromClient.FromString(encode_from_client(request))
    for name, value in fields.items():
        setattr(message.request, name, value)
    return message.SerializeToString(deterministic=True)


def _numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


MINUS_ONE = 2**32 - 1
TOKEN = 64 * 4  # bytes
BAD_FIELDS: dict[str, dict[str, Any]] = {
    "no examples": {"lengths": b"", "embeddings": b""},
    "a length of zero": {"lengths": _numbers(0, 1, 1), "embeddings": bytes(2 * TOKEN)},
    "a length of minus one": {"lengths": _numbers(MINUS_ONE, 1, 1)},
    "lengths that overflow": {"lengths": _numbers(*[2**31] * 3)},
    "an example that is too long": {"lengths": _numbers(129), "embeddings": bytes(129 * TOKEN)},
    "too many examples": {"lengths": _numbers(*[1] * 65), "embeddings": bytes(65 * TOKEN)},
    "half a length": {"lengths": _numbers(1, 1, 1)[:-1]},
    "fewer tokens than said": {"embeddings": b"\0" * 256},
    "more tokens than said": {"lengths": _numbers(1, 1, 1)},
    "no tokens": {"embeddings": b""},
    "a kind that is none": {"kind": 4},
    "no kind": {"kind": 0},
    "number zero": {"number": 0},
    "a number left out": {"number": 2},
    "the largest number": {"number": 2**64 - 1},
    "labels that nobody wants": {"labels": _numbers(0, 0, 0)},
    "no labels": {"kind": 1},
    "too few labels": {"kind": 1, "labels": _numbers(0, 0)},
    "a label beyond the answers": {"kind": 1, "labels": _numbers(0, 0, 5)},
    "a label of minus one": {"kind": 1, "labels": _numbers(0, 0, MINUS_ONE)},
    "half a label": {"kind": 1, "labels": _numbers(0, 0, 0)[:-1]},
}


@pytest.mark.parametrize("what", BAD_FIELDS)
def test_a_request_that_cannot_be_is_not_computed(
    server: SplitServer, held: Held, parties: Parties, terms: Terms, what: str
) -> None:
    before = len(held.rows)
    ended = _refused(server, parties, terms, _changed(a_request(terms), **BAD_FIELDS[what]))
    assert ended.code == INVALID
    assert len(held.rows) == before + 1  # the honest one's


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_embeddings_that_are_not_finite_are_not_computed(
    held: Held, parties: Parties, encoding: Encoding, value: float
) -> None:
    terms = terms_of(held, FEDERATION, encoding)
    request = a_request(terms)
    bits = {
        "float32": struct.pack("<f", value),
        "float16": struct.pack("<e", value),
        "bfloat16": struct.pack("<f", value)[2:],
        "int8": struct.pack("<f", value),  # the first token's scale
    }[encoding]
    hostile = replace(request, embeddings=bits + request.embeddings[len(bits) :])
    before = len(held.rows)
    with serving(held, parties.roster, encoding) as server:
        ended = _refused(server, parties, terms, hostile)
    assert ended.code == INVALID
    assert len(held.rows) == before + 1


def test_a_number_is_used_once(server: SplitServer, parties: Parties, terms: Terms) -> None:
    assert _refused(server, parties, terms, a_request(terms), a_request(terms)).code == INVALID


@pytest.mark.parametrize("values", [np.ones(14), np.ones(16), np.ones(0), [NAN] * 15, [INF] * 15])
def test_an_upstream_that_cannot_be(
    server: SplitServer, parties: Parties, terms: Terms, values: Any
) -> None:
    with member(server.port, parties, "malicious", terms) as raw:
        raw.say(a_request(terms, 1, Kind.OPEN))
        assert isinstance(raw.hear(), Answer)
        raw.say(Upstream(1, 1000, np.array(values, np.float32).tobytes()))
        with pytest.raises(Ended) as found:
            raw.hear()
    assert found.value.code == INVALID


def test_an_upstream_for_what_is_not_awaited(
    server: SplitServer, parties: Parties, terms: Terms
) -> None:
    step = Upstream(1, 1000, np.ones(15, np.float32).tobytes())
    forgotten = Refusal(1, Reason.FORGOTTEN)
    with (
        member(server.port, parties, "honest", terms) as other,
        member(server.port, parties, "malicious", terms) as raw,
    ):
        other.say(a_request(terms, 1, Kind.OPEN))
        assert isinstance(other.hear(), Answer)
        raw.say(step)  # of the other's request
        assert raw.hear() == forgotten
        raw.say(a_request(terms, 1, Kind.OUTPUTS))
        assert isinstance(raw.hear(), Answer)
        raw.say(step)
        assert raw.hear() == forgotten
        raw.say(a_request(terms, 2, Kind.OPEN))
        assert isinstance(raw.hear(), Answer)
        for expected in (Answer, Refusal):  # once, not twice
            raw.say(replace(step, number=2))
            assert isinstance(raw.hear(), expected)
        other.say(step)
        assert isinstance(other.hear(), Answer)


def test_no_client_has_more_requests_than_its_share(
    held: Held, parties: Parties, terms: Terms
) -> None:
    held.gate.clear()
    with (
        serving(held, parties.roster) as server,
        member(server.port, parties, "malicious", terms) as raw,
        member(server.port, parties, "honest", terms) as other,
    ):
        for number in range(1, 9):
            raw.say(a_request(terms, number))
        assert [raw.hear() for _ in range(6)] == [Refusal(n, Reason.BUSY) for n in range(3, 9)]
        other.say(a_request(terms))
        held.gate.set()
        assert isinstance(other.hear(), Answer)
        assert {raw.hear().number, raw.hear().number} == {1, 2}


def test_second_steps_that_never_come_count_as_requests(
    server: SplitServer, parties: Parties, terms: Terms
) -> None:
    with member(server.port, parties, "malicious", terms) as raw:
        for number in (1, 2):
            raw.say(a_request(terms, number, Kind.OPEN))
            assert isinstance(raw.hear(), Answer)
        raw.say(a_request(terms, 3, Kind.OUTPUTS))
        assert raw.hear() == Refusal(3, Reason.BUSY)


def _is_malformed(decode: Any, *arguments: Any) -> bool:
    try:
        decode(*arguments)
    except MalformedMessage:
        return True
    return False


def _messages(terms: Terms) -> dict[str, bytes]:
    return {
        "request": encode_from_client(a_request(terms, 1, Kind.DIFFERENTIATE)),
        "upstream": encode_from_client(Upstream(1, 9, np.ones(15, np.float32).tobytes())),
    }


@pytest.mark.parametrize("kind", ["request", "upstream"])
def test_bytes_that_are_no_message_are_refused(
    server: SplitServer, parties: Parties, terms: Terms, kind: str
) -> None:
    good = _messages(terms)[kind]
    here = server.description
    decode_from_client(good, here)
    for how, payload in (spoiled(good) | other_spellings(good)).items():
        assert _is_malformed(decode_from_client, payload, here), how
    for payload in (b"", good[:-1], good + good, b"\xff" * 1000):
        assert _refused(server, parties, terms, payload).code == INVALID


def test_what_a_server_says_is_read_as_strictly() -> None:
    said = {
        "challenge": Challenge(bytes(32)),
        "welcome": Welcome(),
        "answer": Answer(1, bytes(12), b"abc"),
        "refusal": Refusal(1, Reason.BUSY),
    }
    for kind, one in said.items():
        good = encode_from_server(one)
        found = decode_from_server(good, 1000)
        assert type(found) is type(one), kind
        with pytest.raises(MalformedMessage):
            decode_from_server(good, len(good) - 1)
        for how, payload in (spoiled(good) | other_spellings(good)).items():
            assert _is_malformed(decode_from_server, payload, 1000), f"{kind}: {how}"
    for wrong in (
        pb.FromServer(challenge=pb.Challenge(nonce=bytes(31))),
        pb.FromServer(refusal=pb.Refusal(number=1, reason=7)),
        pb.FromServer(refusal=pb.Refusal(number=1, reason=0)),
        pb.FromServer(answer=pb.Answer(number=0, values=b"", gradient=b"")),
    ):
        with pytest.raises(MalformedMessage):
            decode_from_server(wrong.SerializeToString(), 1000)


@pytest.mark.parametrize("gradient", [b"", b"\0" * 9, struct.pack("<f", NAN) * 8])
def test_a_gradient_that_is_none_is_not_trained_on(gradient: bytes) -> None:
    class Lying:
        def differentiate(self, tokens: bytes, lengths: Any, labels: Any) -> Any:
            return np.ones(2, np.float32), gradient

    channel = Channel(Lying(), "float32", Meter())  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="gradient"):
        channel.differentiate(np.ones((2, 1, 4), np.float32), np.array([1, 1]), np.array([0, 0]))


@pytest.mark.parametrize("rungs", [0, 2])
@pytest.mark.parametrize("outputs", [b"abc", b"\0" * 60, struct.pack("<f", NAN) * 16])
def test_outputs_that_are_none_are_not_trained_on(outputs: bytes, rungs: int) -> None:
    class Lying:
        def outputs(self, tokens: bytes, lengths: Any) -> bytes:
            return outputs

        def pull_back(self, tokens: bytes, lengths: Any, upstream: Any) -> Any:
            return outputs, upstream(outputs)

    channel = Channel(Lying(), "float32", Meter(), rungs)  # type: ignore[arg-type]
    examples = np.ones((2, 1, 4), np.float32), np.array([1, 1])
    for ask in (channel.outputs, lambda *sent: channel.pull_back(*sent, np.ones_like)):
        with pytest.raises(TrainingError, match="outputs are none"):
            ask(*examples)


def test_no_embedding_label_or_answer_is_in_a_log(
    held: Held, parties: Parties, terms: Terms, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    embeddings, lengths, labels = some_examples(1, 3, terms.width)
    embeddings[:] = 0.12345678
    with serving(held, parties.roster) as server:
        with parties.base("honest", server.port, terms) as base:
            losses, _ = base.differentiate(embeddings, lengths, labels)
            held.error = MemoryError()
            with pytest.raises(TrainingError):
                base.differentiate(embeddings, lengths, labels)
            held.error = None
        request = a_request(terms)
        bad = _changed(request, lengths=_numbers(4, 4, 999))
        ended = _refused(server, parties, terms, bad)
    text = caplog.text + str(ended) + repr(request)
    assert "honest is there" in text
    for secret in ("0.1234", str(losses[0])[:6], repr(request.embeddings[:8])[2:-1]):
        assert secret not in text
