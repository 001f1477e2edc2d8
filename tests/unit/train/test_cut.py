"""Training across the cut against training the whole model, on a real decoder."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedtune.base.answering import AnsweringDecoder
from fedtune.base.causal import CausalBase
from fedtune.train.channel import CutTraffic, Meter, in_process_channel
from fedtune.train.cut import AcrossCut, Behind, InProcessBase, WholeModel

ANSWERS = ("yes", "no", "red", "circle")
ROWS, LONGEST = 5, 7
LENGTHS = torch.tensor([7, 3, 5, 1, 6])
LABELS = torch.tensor([0, 3, 2, 1, 1])


@pytest.fixture(scope="module")
def decoder(answering_decoder: Path) -> AnsweringDecoder:
    return AnsweringDecoder(CausalBase(str(answering_decoder)), ANSWERS)


@pytest.fixture(scope="module")
def embeddings(decoder: AnsweringDecoder) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, LONGEST, decoder.width, generator=generator) * 0.2


def gradient(behind: Behind, embeddings: Tensor) -> tuple[float, Tensor]:
    x = embeddings.clone().requires_grad_()
    loss = behind.loss(2 * x, LENGTHS, LABELS)
    (3 * loss).backward()
    return float(loss.detach()), x.grad


@pytest.mark.parametrize("labels", ["server", "client"])
def test_gradients_across_the_cut_are_those_of_the_whole_model(
    decoder: AnsweringDecoder, embeddings: Tensor, labels: str
) -> None:
    loss, expected = gradient(WholeModel(decoder), embeddings)
    found_loss, found = gradient(AcrossCut(InProcessBase(decoder), labels), embeddings)
    assert found_loss == pytest.approx(loss, abs=1e-5)
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_does_not_count_has_no_gradient(decoder: AnsweringDecoder, embeddings: Tensor) -> None:
    array = embeddings.numpy()
    _, found = InProcessBase(decoder).differentiate(array, LENGTHS.numpy(), LABELS.numpy())
    padding = np.arange(LONGEST) >= LENGTHS.numpy()[:, None]
    assert np.abs(found[padding]).max() == 0.0
    assert np.abs(found[~padding]).max() > 0.0


def test_a_client_that_keeps_its_answers_never_says_them(
    decoder: AnsweringDecoder, embeddings: Tensor
) -> None:
    class NoAnswers(InProcessBase):
        def differentiate(self, *_arguments: object) -> tuple[np.ndarray, np.ndarray]:
            raise AssertionError("the answers were sent")

    remote = NoAnswers(decoder)
    gradient(AcrossCut(remote, "client"), embeddings)
    with torch.inference_mode():
        found = AcrossCut(remote, "server").scores(embeddings, LENGTHS)
    torch.testing.assert_close(found, decoder.scores(embeddings, LENGTHS))


def test_without_a_gradient_none_is_asked_for(
    decoder: AnsweringDecoder, embeddings: Tensor
) -> None:
    """Forward-only training needs the loss alone."""
    meter = Meter()
    behind = AcrossCut(in_process_channel(InProcessBase(decoder), decoder.width, "float32", meter))
    with torch.inference_mode():
        loss = behind.loss(embeddings, LENGTHS, LABELS)
    expected = functional.cross_entropy(decoder.scores(embeddings, LENGTHS), LABELS)
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    assert (meter.traffic.trained, meter.traffic.evaluated) == (0, ROWS)


@pytest.mark.parametrize(
    ("encoding", "each", "largest"),
    [("float32", 4.0, 1e-6), ("float16", 2.0, 2e-3), ("bfloat16", 2.0, 2e-2), ("int8", None, 5e-2)],
)
@pytest.mark.parametrize("labels", ["server", "client"])
def test_a_channel_rounds_and_counts(
    decoder: AnsweringDecoder,
    embeddings: Tensor,
    encoding: str,
    each: float | None,
    largest: float,
    labels: str,
) -> None:
    meter = Meter()
    _, expected = gradient(WholeModel(decoder), embeddings)
    behind = AcrossCut(
        in_process_channel(InProcessBase(decoder), decoder.width, encoding, meter), labels
    )
    _, found = gradient(behind, embeddings)
    error = float((found - expected).norm() / expected.norm())
    assert error < largest
    if encoding != "float32":
        assert error > largest / 200  # it did round
    tokens, width = int(LENGTHS.sum()), decoder.width
    values = tokens * (width * each if each else width + 4)
    answers = ROWS * len(ANSWERS) * 4
    up, down = (answers, answers) if labels == "client" else (4 * ROWS, 4 * ROWS)
    assert meter.traffic == CutTraffic(ROWS, tokens, int(values) + up, int(values) + down, 0, 0)


def test_a_meter_counts_over_forks() -> None:
    meter = Meter()
    child = multiprocessing.get_context("fork").Process(
        target=meter.add, args=[CutTraffic(1, 2, 3, 4, 5, 6)]
    )
    child.start()
    child.join()
    meter.add(CutTraffic(evaluated=10))
    assert meter.traffic == CutTraffic(1, 2, 3, 4, 15, 6)
