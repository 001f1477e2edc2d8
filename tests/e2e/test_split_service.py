"""A base model over real sockets, against the whole model in this process."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from split_service import (
    FEDERATION,
    Parties,
    ServerProcess,
    serving,
    some_examples,
)

from fedtune.base.answering import AnsweringDecoder
from fedtune.config import Limits
from fedtune.split.server import terms_of
from fedtune.train.activations import ENCODINGS, Encoding
from fedtune.train.channel import Channel, InProcessCarrier, Meter
from fedtune.train.cut import AcrossCut, InProcessBase, WholeModel
from fedtune.train.remote import Labels

CLIENTS = tuple(f"clinic-{place}" for place in range(4))


@pytest.fixture(scope="module")
def parties() -> Parties:
    return Parties.make(*CLIENTS)


@pytest.fixture(scope="module")
def server(
    tiny_decoder: Path, parties: Parties, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A process of its own; without TLS, in float32."""
    folder = tmp_path_factory.mktemp("server")
    process = ServerProcess(folder, tiny_decoder, parties.roster).start()
    yield process
    process.stop()


@pytest.mark.parametrize("labels", ["server", "client"])
def test_gradients_over_the_wire_are_those_of_the_whole_model(
    server: ServerProcess, decoder: AnsweringDecoder, parties: Parties, labels: Labels
) -> None:
    embeddings, lengths, targets = (torch.from_numpy(a) for a in some_examples(1, 7, decoder.width))
    terms = terms_of(decoder, FEDERATION, "float32")
    with parties.base("clinic-0", server.port, terms) as base:
        found = []
        for behind in (WholeModel(decoder), AcrossCut(base, labels)):
            x = embeddings.clone().requires_grad_()
            loss = behind.loss(x, lengths, targets)
            loss.backward()
            found.append((float(loss), x.grad.numpy(), behind.scores(embeddings, lengths).numpy()))
    (loss, gradient, scores), (their_loss, their_gradient, their_scores) = found
    assert their_loss == pytest.approx(loss, abs=1e-5)
    assert np.abs(gradient).max() > 1e-3
    np.testing.assert_allclose(their_gradient, gradient, atol=1e-5 * np.abs(gradient).max())
    np.testing.assert_allclose(their_scores, scores, atol=1e-5)


def _steps(base: Any, seed: int, width: int) -> list[Any]:
    """What a client is told in steps of all three kinds."""
    found: list[Any] = []
    for step in range(6):
        embeddings, lengths, labels = some_examples(10 * seed + step, 2 + seed, width)
        found += base.differentiate(embeddings, lengths, labels)
        found.append(base.outputs(embeddings, lengths))
        found.append(base.pull_back(embeddings, lengths, np.tanh))
    return found


def test_clients_at_one_time_get_what_they_get_one_after_another(
    server: ServerProcess, decoder: AnsweringDecoder, parties: Parties
) -> None:
    terms = terms_of(decoder, FEDERATION, "float32")
    bases = [parties.base(name, server.port, terms) for name in CLIENTS]
    one_by_one = [_steps(base, seed, decoder.width) for seed, base in enumerate(bases)]
    with ThreadPoolExecutor(len(CLIENTS)) as pool:
        width = [decoder.width] * len(CLIENTS)
        together = list(pool.map(_steps, bases, range(len(CLIENTS)), width))
    for base in bases:
        base.close()
    for alone, shared in zip(one_by_one, together, strict=True):
        for expected, found in zip(alone, shared, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_encoding_says_and_costs_the_same_as_within_a_process(
    decoder: AnsweringDecoder, parties: Parties, encoding: Encoding
) -> None:
    here, there = Meter(), Meter()
    carrier = InProcessCarrier(InProcessBase(decoder), decoder.width, encoding)
    terms = terms_of(decoder, FEDERATION, encoding)
    with (
        serving(decoder, parties.roster, encoding) as server,
        parties.base("clinic-0", server.port, terms, meter=there) as base,
    ):
        found = _steps(base, 3, decoder.width)
        expected = _steps(Channel(carrier, encoding, here), 3, decoder.width)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6 * np.abs(other).max())
        assert there.traffic == here.traffic
        # An answer is counted when it is sent, and the last may just have come.
        base.close()
    assert server.status.traffic == {"clinic-0": here.traffic}
    least = 2 * here.traffic.tokens * decoder.width * {"float32": 4, "int8": 1}.get(encoding, 2)
    assert least < here.traffic.up + here.traffic.down < 1.2 * least


def test_what_is_more_than_the_server_takes_is_refused_before_it_is_sent(
    decoder: AnsweringDecoder, parties: Parties
) -> None:
    terms = terms_of(decoder, FEDERATION, "float32")
    limits = Limits(examples=4, tokens=8, message_bytes=8000)
    from fedtune.errors import BaseRefused

    with (
        serving(decoder, parties.roster, limits=limits) as server,
        parties.base("clinic-0", server.port, terms) as base,
    ):
        for count, longest, words in ((5, 8, "5 examples"), (1, 9, "9 tokens"), (4, 8, "bytes")):
            embeddings, lengths, _ = some_examples(0, count, decoder.width, longest)
            lengths[:] = longest
            with pytest.raises(BaseRefused, match=words):
                base.outputs(embeddings, lengths)
        embeddings, lengths, _ = some_examples(0, 3, decoder.width, 8)
        assert base.outputs(embeddings, lengths).shape == (3, 5)
    assert server.status.requests == 1
