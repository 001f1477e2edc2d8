"""A ladder's training: what its gradient touches, and that an example is asked for once."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedtune.adapter.ladder import attach_ladder
from fedtune.adapter.lora import AttachedAdapter
from fedtune.base.answering import AnsweringDecoder
from fedtune.base.causal import CausalBase
from fedtune.base.connector import Connector
from fedtune.train.activations import encoded_bytes
from fedtune.train.channel import CutTraffic, Meter, in_process_channel
from fedtune.train.cut import AcrossCut, Behind, InProcessBase, WholeModel
from fedtune.train.ladder import LadderAnswering
from fedtune.train.questions import EncodedQuestions, QuestionAnswering
from fedtune.train.state_cache import StateCache
from fedtune.train.texts import TokenizedTexts
from fedtune.train.torch_trainer import TorchSettings, TorchTrainer
from fedtune.train.trainer import LocalPlan

ANSWERS, ROWS, FEATURES, RUNGS = ("yes", "no", "red", "circle"), 12, 10, 2
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def decoder(answering_decoder: Path) -> AnsweringDecoder:
    return AnsweringDecoder(CausalBase(str(answering_decoder)), ANSWERS, RUNGS)


@pytest.fixture
def half(decoder: AnsweringDecoder) -> AttachedAdapter:
    torch.manual_seed(0)
    connector = Connector(FEATURES, decoder.width, 2)
    connector.length.fill_(1.5)
    table: nn.Embedding = decoder.base.module.get_input_embeddings()
    return attach_ladder(connector, table, decoder.head, RUNGS, 6, 0)


@pytest.fixture(scope="module")
def data() -> EncodedQuestions:
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, 200, length).tolist() for length in rng.integers(3, 7, ROWS)]
    texts = TokenizedTexts.of(ids, rng.integers(0, len(ANSWERS), ROWS))
    features = rng.normal(size=(ROWS, FEATURES)).astype(np.float16)
    return EncodedQuestions(texts, np.arange(ROWS), features, np.arange(ROWS))


def task_of(
    half: AttachedAdapter, behind: Behind, cache: StateCache | None = None
) -> LadderAnswering:
    cache = cache or StateCache(RUNGS * half.module.embeddings.embedding_dim, 1 << 20)
    return LadderAnswering(half.module, QuestionAnswering(0, behind), cache)


def across(decoder: AnsweringDecoder, meter: Meter, encoding: str = "float16") -> AcrossCut:
    remote = in_process_channel(InProcessBase(decoder), decoder.width, encoding, meter, RUNGS)
    return AcrossCut(remote)


def plan(epochs: int) -> LocalPlan:
    batches = [rows for _ in range(epochs) for rows in np.split(np.arange(ROWS), 3)]
    return LocalPlan(iter(batches), iter([0.01] * len(batches)), 0)


def test_an_example_is_asked_for_once(
    decoder: AnsweringDecoder, half: AttachedAdapter, data: EncodedQuestions
) -> None:
    meter = Meter()
    task = task_of(half, across(decoder, meter))
    trainer = TorchTrainer(half, task, "ab" * 32, TorchSettings())
    start = half.read()
    trained = trainer.train(start, data, plan(1))
    tokens, width = int(data.lengths.sum()) + 2 * ROWS, decoder.width
    up = encoded_bytes(tokens, width, "float16")
    down = encoded_bytes(RUNGS * ROWS, width, "float16")
    once = CutTraffic(ROWS, tokens, up, down, 0, 0)
    assert meter.traffic == once
    # Later epochs, parts of the data and evaluations of it cost nothing; other rows do.
    again = trainer.train(trained.adapter, data, plan(20))
    part = data.select(np.array([3, 5])).concatenate([data.select(np.array([0]))])
    assert trainer.evaluate(again.adapter, part).examples == 3
    assert meter.traffic == once
    assert again.loss < 0.7 * trained.loss
    other = EncodedQuestions(data.texts, data.images, data.features, data.numbers + ROWS)
    trainer.evaluate(again.adapter, other)
    assert meter.traffic == once + CutTraffic(evaluated=ROWS, evaluation_bytes=up + down)


def test_processes_that_were_forked_share_what_was_asked(
    decoder: AnsweringDecoder, half: AttachedAdapter, data: EncodedQuestions
) -> None:
    meter = Meter()
    task = task_of(half, across(decoder, meter))
    rows = np.arange(ROWS)
    child = multiprocessing.get_context("fork").Process(
        target=task.batch, args=(data, rows[:8], CPU)
    )
    child.start()
    child.join()
    assert (child.exitcode, meter.traffic.trained) == (0, 8)
    found, _ = task.batch(data, rows, CPU)
    assert meter.traffic.trained == ROWS
    expected, _ = task_of(half, across(decoder, Meter())).batch(data, rows, CPU)
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-3)


def test_first_or_later_a_row_is_the_same_whatever_the_encoding(
    decoder: AnsweringDecoder, half: AttachedAdapter, data: EncodedQuestions
) -> None:
    task = task_of(half, across(decoder, Meter(), "float32"))
    first, labels = task.batch(data, np.arange(ROWS), CPU)
    again, _ = task.batch(data, np.arange(ROWS), CPU)
    assert torch.equal(first, again)
    assert labels.tolist() == data.labels.tolist()


def test_no_gradient_touches_the_decoder(
    decoder: AnsweringDecoder, half: AttachedAdapter, data: EncodedQuestions
) -> None:
    """Nothing of its pass is kept, not even where its own weights would take gradients."""
    sent: list[Tensor] = []

    class Watching(WholeModel):
        def activations(self, embeddings: Tensor, lengths: Tensor, training: bool) -> Tensor:
            sent.append(super().activations(embeddings, lengths, training))
            return sent[-1]

    parameters = list(decoder.base.module.parameters())
    for parameter in parameters:
        parameter.requires_grad_()
    try:
        task = task_of(half, Watching(decoder))
        loss = task.loss(half.module, task.batch(data, np.arange(ROWS), CPU))
        loss.backward()
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    assert len(sent) == 1
    assert sent[0].grad_fn is None
    assert not sent[0].requires_grad
    assert all(parameter.grad is None for parameter in parameters)
    assert np.abs(half.read_gradient()).max() > 0


def test_the_first_round_says_what_scores_say(
    decoder: AnsweringDecoder, half: AttachedAdapter, data: EncodedQuestions
) -> None:
    scored = AnsweringDecoder(decoder.base, ANSWERS)
    questions = QuestionAnswering(0, WholeModel(scored))
    prompt, labels = questions.batch(data, np.arange(ROWS), CPU)
    with torch.inference_mode():
        scores = scored.scores(*half.module(prompt))
    expected = float(nn.functional.cross_entropy(scores, labels, reduction="sum"))
    found = TorchTrainer(half, task_of(half, WholeModel(decoder)), "ab" * 32, TorchSettings())
    evaluation = found.evaluate(half.read(), data)
    # States are kept in float16, so that scores of ±20 differ in their fourth digit.
    assert evaluation.loss_sum == pytest.approx(expected, rel=2e-3)


def test_what_does_not_fit_is_asked_for_again(
    decoder: AnsweringDecoder,
    half: AttachedAdapter,
    data: EncodedQuestions,
    caplog: pytest.LogCaptureFixture,
) -> None:
    meter, values = Meter(), RUNGS * decoder.width
    cache = StateCache(values, 2 * values * 5 + 3)
    assert cache.rows == 5
    task = task_of(half, across(decoder, meter), cache)
    whole = [task.batch(data, np.arange(ROWS), CPU)[0] for _ in range(3)]
    assert meter.traffic.trained == ROWS + 2 * (ROWS - 5)
    torch.testing.assert_close(whole[0], whole[2], atol=1e-2, rtol=1e-3)
    assert caplog.messages == [
        "activations of 5 examples are kept, those of others are asked for each time"
    ]


def test_what_is_too_large_for_float16_is_kept_as_large_as_can_be(
    half: AttachedAdapter, data: EncodedQuestions
) -> None:
    class Large:
        def activations(self, embeddings: Tensor, lengths: Tensor, training: bool) -> Tensor:
            return torch.full((len(lengths), RUNGS * embeddings.shape[2]), -1e6)

    found, _ = task_of(half, Large()).batch(data, np.arange(2), CPU)
    assert torch.equal(found, torch.full_like(found, -65504.0))
