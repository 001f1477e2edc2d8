"""Training of what is on both sides of a decoder, against autograd through the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedtune.adapter.lora import AttachedAdapter
from fedtune.adapter.nano import Nano, attach_nano
from fedtune.base.answering import AnsweringDecoder
from fedtune.base.causal import CausalBase
from fedtune.base.connector import Connector
from fedtune.errors import TrainingError
from fedtune.train.activations import Encoding
from fedtune.train.channel import CutTraffic, Meter, in_process_channel
from fedtune.train.cut import AcrossCut, Behind, Float32Array, InProcessBase, WholeModel
from fedtune.train.questions import EncodedQuestions, QuestionAnswering
from fedtune.train.texts import TokenizedTexts

ANSWERS, ROWS, FEATURES = ("yes", "no", "red", "circle"), 6, 10
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(answering_decoder: Path) -> CausalBase:
    return CausalBase(str(answering_decoder))


@pytest.fixture(scope="module")
def decoder(base: CausalBase) -> AnsweringDecoder:
    return AnsweringDecoder(base, ANSWERS, rungs=1)


@pytest.fixture
def half(decoder: AnsweringDecoder) -> AttachedAdapter:
    torch.manual_seed(0)
    connector = Connector(FEATURES, decoder.width, 2)
    connector.length.fill_(1.5)
    table: nn.Embedding = decoder.base.module.get_input_embeddings()
    return attach_nano(connector, table, Nano(4, 3), 0, decoder.head)


@pytest.fixture(scope="module")
def data() -> EncodedQuestions:
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, 200, length).tolist() for length in rng.integers(3, 7, ROWS)]
    texts = TokenizedTexts.of(ids, rng.integers(0, len(ANSWERS), ROWS))
    features = rng.normal(size=(ROWS, FEATURES)).astype(np.float16)
    return EncodedQuestions(texts, np.arange(ROWS), features, np.arange(ROWS))


def moved(half: AttachedAdapter) -> AttachedAdapter:
    """Away from where nothing depends on `down`."""
    rng = np.random.default_rng(1)
    half.write(rng.normal(0, 0.2, half.manifest.size).astype(np.float32))
    return half


def gradient(half: AttachedAdapter, data: EncodedQuestions, behind: Behind) -> tuple[float, Any]:
    task = QuestionAnswering(0, behind)
    half.zero_grad()
    loss = task.loss(half.module, task.batch(data, np.arange(ROWS), CPU))
    loss.backward()
    return float(loss.detach()), half.read_gradient()


def across(
    decoder: AnsweringDecoder, encoding: Encoding, meter: Meter, remote: Any = None
) -> AcrossCut:
    remote = remote or InProcessBase(decoder)
    channel = in_process_channel(remote, decoder.width, encoding, meter, decoder.rungs)
    return AcrossCut(channel, "client")


def test_gradients_across_the_cut_are_those_of_the_whole_model(
    decoder: AnsweringDecoder, half: AttachedAdapter, data: EncodedQuestions
) -> None:
    moved(half)
    loss, expected = gradient(half, data, WholeModel(decoder))
    found_loss, found = gradient(half, data, across(decoder, "float32", Meter()))
    assert found_loss == pytest.approx(loss, abs=1e-5)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    places = half.manifest.size - 3 * (2 * decoder.width + 1) - decoder.width
    for part in (expected[:places], expected[places:]):  # in front of the decoder, and behind it
        assert np.abs(part).max() > 1e-2


def test_the_first_round_says_what_scores_say(
    base: CausalBase, decoder: AnsweringDecoder, half: AttachedAdapter, data: EncodedQuestions
) -> None:
    scored = AnsweringDecoder(base, ANSWERS)
    without = attach_nano(half.module.connector, half.module.embeddings, Nano(4), 0)
    batch = QuestionAnswering(0, WholeModel(scored)).batch(data, np.arange(ROWS), CPU)
    with torch.inference_mode():
        expected = WholeModel(scored).scores(*without.module(batch[0]))
        for behind in (WholeModel(decoder), across(decoder, "float32", Meter())):
            found = behind.scores(*half.module(batch[0]), half.module.readout)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("encoding", "each", "largest"), [("float16", 2, 2e-3), ("bfloat16", 2, 3e-2), ("int8", 1, 0.1)]
)
def test_states_are_rounded_and_counted_as_embeddings_are(
    decoder: AnsweringDecoder,
    half: AttachedAdapter,
    data: EncodedQuestions,
    encoding: Encoding,
    each: int,
    largest: float,
) -> None:
    _, expected = gradient(moved(half), data, WholeModel(decoder))
    meter = Meter()
    _, found = gradient(half, data, across(decoder, encoding, meter))
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert largest / 200 < error < largest
    tokens = int(data.lengths.sum()) + 2 * ROWS
    row = decoder.width * each + 4 * (encoding == "int8")
    passed = (tokens + ROWS) * row
    assert meter.traffic == CutTraffic(ROWS, tokens, passed, passed, 0, 0)


def test_neither_answers_nor_readout_leave(
    decoder: AnsweringDecoder, half: AttachedAdapter, data: EncodedQuestions
) -> None:
    """Of a batch the other side is told embeddings, and one gradient as long as a state."""
    told: list[np.ndarray] = []

    class Watching(InProcessBase):
        def differentiate(self, *_arguments: object) -> Any:
            raise AssertionError("the answers were sent")

        def pull_back(
            self,
            embeddings: Float32Array,
            lengths: Any,
            upstream: Callable[[Float32Array], Float32Array],
        ) -> Float32Array:
            def watched(outputs: Float32Array) -> Float32Array:
                told.append(upstream(outputs))
                return told[-1]

            return super().pull_back(embeddings, lengths, watched)

    gradient(moved(half), data, across(decoder, "float32", Meter(), Watching(decoder)))
    assert [part.shape for part in told] == [(ROWS, decoder.width)]


def test_of_several_tries_the_last_one_counts(
    decoder: AnsweringDecoder, half: AttachedAdapter, data: EncodedQuestions
) -> None:
    """A server that is asked again has forgotten the first try; its gradient must not stay."""

    class Forgetful(InProcessBase):
        def pull_back(self, embeddings: Float32Array, lengths: Any, upstream: Any) -> Any:
            super().pull_back(embeddings, lengths, lambda outputs: upstream(outputs + 1))
            return super().pull_back(embeddings, lengths, upstream)

    _, expected = gradient(moved(half), data, across(decoder, "float32", Meter()))
    _, found = gradient(half, data, AcrossCut(Forgetful(decoder), "client"))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_readout_that_diverges_says_so(
    decoder: AnsweringDecoder, half: AttachedAdapter, data: EncodedQuestions
) -> None:
    half.write(np.full(half.manifest.size, 1e30, np.float32))
    with torch.no_grad():  # in front of the decoder all is well
        for part in (half.module.nano_image, half.module.nano_text):
            part.up.weight.zero_()
            part.up.bias.zero_()
            part.down.weight.zero_()
    with pytest.raises(TrainingError, match="diverged"):
        gradient(half, data, across(decoder, "float32", Meter()))
