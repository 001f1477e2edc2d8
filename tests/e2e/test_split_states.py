"""A base model that answers with states, over real sockets, against the one in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from split_raw import a_request, member
from split_service import ANSWERS, FEDERATION, Parties, serving, some_examples

from fedtune.adapter.nano import GrayBoxReadout
from fedtune.base.answering import AnsweringDecoder
from fedtune.base.causal import CausalBase
from fedtune.errors import BaseRefused, MalformedMessage
from fedtune.split.server import terms_of
from fedtune.train.activations import ENCODINGS, Encoding
from fedtune.train.channel import Channel, InProcessCarrier, Meter
from fedtune.train.cut import AcrossCut, InProcessBase, WholeModel
from fedtune.wire.split import Answer, Kind, Upstream, decode_from_client, encode_from_client

NAME = "clinic"


@pytest.fixture(scope="module")
def base(tiny_decoder: Path) -> CausalBase:
    return CausalBase(str(tiny_decoder))


@pytest.fixture(scope="module")
def parties() -> Parties:
    return Parties.make(NAME)


def test_a_gray_boxs_gradients_over_the_wire_are_those_of_the_whole_model(
    base: CausalBase, parties: Parties
) -> None:
    decoder = AnsweringDecoder(base, ANSWERS, rungs=1)
    torch.manual_seed(0)
    readout = GrayBoxReadout(decoder.head, 4)
    torch.nn.init.normal_(readout.nano_output.up.weight, std=0.3)
    embeddings, lengths, labels = map(torch.from_numpy, some_examples(1, 7, decoder.width))
    found: list[list[Any]] = []
    with (
        serving(decoder, parties.roster) as server,
        parties.base(NAME, server.port, terms_of(decoder, FEDERATION, "float32")) as remote,
    ):
        for behind in (WholeModel(decoder), AcrossCut(remote, "client")):
            x = embeddings.clone().requires_grad_()
            readout.zero_grad()
            loss = behind.loss(x, lengths, labels, readout)
            loss.backward()
            own = [parameter.grad.clone() for parameter in readout.parameters()]
            scores = behind.scores(embeddings, lengths, readout)
            found.append([part.detach().numpy() for part in (loss, scores, x.grad, *own)])
    for expected, over_the_wire in zip(*found, strict=True):
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(over_the_wire, expected, atol=1e-5)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_states_say_and_cost_the_same_as_within_a_process(
    base: CausalBase, parties: Parties, encoding: Encoding
) -> None:
    decoder = AnsweringDecoder(base, ANSWERS, rungs=2)
    here, there = Meter(), Meter()
    carrier = InProcessCarrier(InProcessBase(decoder), decoder.width, encoding, 2)
    embeddings, lengths, _ = some_examples(3, 5, decoder.width)

    def ask(remote: Any) -> list[np.ndarray]:
        return [
            remote.activations(embeddings, lengths),
            remote.outputs(embeddings, lengths),
            remote.pull_back(embeddings, lengths, np.tanh),
        ]

    with serving(decoder, parties.roster, encoding) as server:
        terms = terms_of(decoder, FEDERATION, encoding)
        with parties.base(NAME, server.port, terms, meter=there) as remote:
            found = ask(remote)
        expected = ask(Channel(carrier, encoding, here, 2))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6 * np.abs(other).max())
    assert found[0].shape == (5, 2 * decoder.width)
    assert np.array_equal(found[0], found[1])
    assert there.traffic == here.traffic
    assert server.status.traffic == {NAME: here.traffic}
    assert (here.traffic.trained, here.traffic.evaluated) == (10, 5)


def test_who_expects_outputs_of_another_kind_is_refused_at_once(
    base: CausalBase, parties: Parties
) -> None:
    decoders = [AnsweringDecoder(base, ANSWERS, rungs) for rungs in range(3)]
    embeddings, lengths, _ = some_examples(3, 5, decoders[0].width)
    for decoder in decoders:
        with serving(decoder, parties.roster) as server:
            for other in decoders:
                if other is decoder:
                    continue
                terms = terms_of(other, FEDERATION, "float32")
                with (
                    parties.base(NAME, server.port, terms) as remote,
                    pytest.raises(BaseRefused, match="outputs of another kind"),
                ):
                    remote.outputs(embeddings, lengths)
        assert server.status.requests == 0


@pytest.mark.parametrize(
    ("rungs", "kind"), [(0, Kind.ACTIVATIONS), (1, Kind.DIFFERENTIATE), (2, Kind.DIFFERENTIATE)]
)
def test_a_kind_that_has_no_meaning_there_is_refused(
    base: CausalBase, parties: Parties, rungs: int, kind: Kind
) -> None:
    decoder = AnsweringDecoder(base, ANSWERS, rungs)
    with serving(decoder, parties.roster) as server:
        request = a_request(terms_of(decoder, FEDERATION, "float32"), 1, kind)
        with pytest.raises(MalformedMessage, match=f"{rungs} rungs"):
            decode_from_client(encode_from_client(request), server.description)


@pytest.mark.parametrize("size", [-4, 0, 4])
def test_an_upstream_is_as_long_as_the_states(
    base: CausalBase, parties: Parties, size: int
) -> None:
    decoder = AnsweringDecoder(base, ANSWERS, rungs=2)
    terms = terms_of(decoder, FEDERATION, "float32")
    with (
        serving(decoder, parties.roster) as server,
        member(server.port, parties, NAME, terms) as raw,
    ):
        raw.say(a_request(terms, 1, Kind.OPEN, count=3))
        said = raw.hear()
        assert len(said.values) == 3 * 2 * terms.width * 4
        raw.say(Upstream(1, 1000, bytes(len(said.values) + size)))
        if size == 0:
            assert isinstance(raw.hear(), Answer)
        else:
            assert raw.end().code.name == "INVALID_ARGUMENT"
