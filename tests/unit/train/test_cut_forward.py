"""Training without gradients in front of a cut, against the exact gradient on a real decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedtune.adapter.lora import AttachedAdapter
from fedtune.adapter.nano import Nano, attach_nano
from fedtune.base.answering import AnsweringDecoder
from fedtune.base.causal import CausalBase
from fedtune.base.connector import Connector
from fedtune.config import parse_config
from fedtune.errors import ConfigError
from fedtune.train.channel import CutTraffic, Meter, in_process_channel
from fedtune.train.cut import AcrossCut, InProcessBase, WholeModel
from fedtune.train.cut_forward import CutForwardTrainer, TorchCutModel
from fedtune.train.directions import Directions
from fedtune.train.question_rows import EncodedQuestions
from fedtune.train.questions import QuestionAnswering
from fedtune.train.remote import Labels
from fedtune.train.texts import TokenizedTexts
from fedtune.train.torch_trainer import TorchSettings, TorchTrainer
from fedtune.train.trainer import LocalPlan

ANSWERS = ("yes", "no", "red", "circle")
ROWS, FEATURES, COUNT, AWAY = 12, 10, 40, 0.01


@pytest.fixture(scope="module")
def decoder(answering_decoder: Path) -> AnsweringDecoder:
    return AnsweringDecoder(CausalBase(str(answering_decoder)), ANSWERS)


@pytest.fixture(scope="module")
def half(decoder: AnsweringDecoder) -> AttachedAdapter:
    torch.manual_seed(0)
    connector = Connector(FEATURES, decoder.width, 2)
    connector.length.fill_(1.5)
    table: nn.Embedding = decoder.base.module.get_input_embeddings()
    return attach_nano(connector, table, Nano(4), 0)


@pytest.fixture(scope="module")
def data() -> EncodedQuestions:
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, 200, length).tolist() for length in rng.integers(3, 7, ROWS)]
    texts = TokenizedTexts.of(ids, rng.integers(0, len(ANSWERS), ROWS))
    features = rng.normal(size=(ROWS, FEATURES)).astype(np.float16)
    return EncodedQuestions(texts, np.arange(ROWS), features, np.arange(ROWS))


@pytest.fixture
def start(half: AttachedAdapter) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.normal(0, 0.1, half.manifest.size).astype(np.float32)


@pytest.fixture
def make(
    decoder: AnsweringDecoder, half: AttachedAdapter, start: np.ndarray
) -> Callable[..., tuple[CutForwardTrainer, Meter]]:
    def make(probes: int, labels: Labels = "server") -> tuple[CutForwardTrainer, Meter]:
        meter = Meter()
        remote = in_process_channel(InProcessBase(decoder), decoder.width, "float32", meter)
        task = QuestionAnswering(0, AcrossCut(remote, labels))
        trainer = TorchTrainer(half, task, "ab" * 32, TorchSettings("sgd"))
        directions = Directions(half.manifest, start, 5, COUNT)
        model = TorchCutModel(trainer, half, task)
        return CutForwardTrainer(model, directions, AWAY, probes), meter

    return make


def exact_slopes(
    decoder: AnsweringDecoder, half: AttachedAdapter, data: EncodedQuestions, start: np.ndarray
) -> np.ndarray:
    """By autograd through the whole model, along each direction."""
    task = QuestionAnswering(0, WholeModel(decoder))
    half.write(start)
    half.zero_grad()
    batch = task.batch(data, np.arange(ROWS), torch.device("cpu"))
    task.loss(half.module, batch).backward()
    gradient = half.read_gradient().astype(np.float64)
    directions = Directions(half.manifest, start, 5, COUNT)
    return np.array(
        [
            gradient @ (directions.move(start, k, 1.0).astype(np.float64) - start)
            for k in range(COUNT)
        ]
    )


@pytest.mark.parametrize("labels", ["server", "client"])
def test_slopes_are_those_of_the_exact_gradient(
    make: Callable[..., tuple[CutForwardTrainer, Meter]],
    decoder: AnsweringDecoder,
    half: AttachedAdapter,
    data: EncodedQuestions,
    start: np.ndarray,
    labels: Labels,
) -> None:
    expected = exact_slopes(decoder, half, data, start)
    trainer, meter = make(COUNT, labels)
    plan = LocalPlan(iter([np.arange(ROWS)]), iter([1.0]), 0)
    found = trainer.train(np.zeros(COUNT, np.float32), data, plan)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(-found.adapter, expected, atol=2e-2 * np.abs(expected).max())
    # All directions for one exchange with the server.
    assert meter.traffic.trained == ROWS
    assert meter.traffic.evaluated == 0


def test_each_step_asks_once_and_looks_along_other_directions(
    make: Callable[..., tuple[CutForwardTrainer, Meter]], data: EncodedQuestions
) -> None:
    trainer, meter = make(10)
    plan = LocalPlan(iter([np.arange(4)] * 4), iter([0.1] * 4), 0)
    found = trainer.train(np.zeros(COUNT, np.float32), data, plan)
    assert (found.adapter != 0).all()  # four times ten, in turn
    tokens = int(data.lengths[:4].sum()) + 2 * 4
    assert (meter.traffic.trained, meter.traffic.tokens) == (16, 4 * tokens)
    assert isinstance(meter.traffic, CutTraffic)


def test_the_loss_falls(
    make: Callable[..., tuple[CutForwardTrainer, Meter]], data: EncodedQuestions
) -> None:
    trainer, _ = make(COUNT)
    before = trainer.evaluate(np.zeros(COUNT, np.float32), data).loss
    plan = LocalPlan(iter([np.arange(ROWS)] * 30), iter([3.0] * 30), 0)
    after = trainer.evaluate(trainer.train(np.zeros(COUNT, np.float32), data, plan).adapter, data)
    assert after.loss < before - 0.05


def test_without_a_cut_there_are_no_probes(
    decoder: AnsweringDecoder, half: AttachedAdapter
) -> None:
    task = QuestionAnswering(0, WholeModel(decoder))
    trainer = TorchTrainer(half, task, "ab" * 32, TorchSettings("sgd"))
    with pytest.raises(ValueError, match="not behind a cut"):
        TorchCutModel(trainer, half, task)
    with pytest.raises(ConfigError, match=r"train\.probes is for"):
        parse_config("", "test", ["train.probes=4"])
