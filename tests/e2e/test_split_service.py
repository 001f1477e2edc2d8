"""A base model over real sockets, in a process of its own, against the whole model in this one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from split_service import (
    FEDERATION,
    Parties,
    ServerProcess,
    load_decoder,
    some_examples,
)

from fedtune.base.answering import AnsweringDecoder
from fedtune.split.server import terms_of
from fedtune.train.cut import AcrossCut, WholeModel

CLIENTS = tuple(f"clinic-{place}" for place in range(4))


@pytest.fixture(scope="module")
def decoder(tiny_decoder: Path) -> AnsweringDecoder:
    """The whole model, here."""
    return load_decoder(tiny_decoder)


@pytest.fixture(scope="module")
def parties() -> Parties:
    return Parties.make(*CLIENTS)


@pytest.fixture(scope="module")
def server(
    tiny_decoder: Path, parties: Parties, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """Without TLS, in float32."""
    folder = tmp_path_factory.mktemp("server")
    process = ServerProcess(folder, tiny_decoder, parties.roster).start()
    yield process
    process.stop()


@pytest.mark.parametrize("labels", ["server", "client"])
def test_gradients_over_the_wire_are_those_of_the_whole_model(
    server: ServerProcess, decoder: AnsweringDecoder, parties: Parties, labels: str
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
