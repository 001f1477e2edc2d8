"""Text classification: padding, the loss formula, and data sets as flat arrays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fedtune.base.classifier import BaseModel, EncoderClassifier
from fedtune.data import TextExamples
from fedtune.train.task import (
    CustomTask,
    Rows,
    TextClassification,
    class_targets,
    tokenize,
)
from fedtune.train.texts import TokenizedTexts

CPU = torch.device("cpu")
TEXTS = st.lists(st.lists(st.integers(0, 99), max_size=6), min_size=1, max_size=8)


def _texts(rows: list[list[int]], labels: list[int] | None = None) -> TokenizedTexts:
    return TokenizedTexts(
        np.array([token for row in rows for token in row], np.int32),
        np.cumsum([0, *(len(row) for row in rows)]),
        np.array(labels if labels is not None else range(len(rows)), np.int64),
    )


def _rows(data: TokenizedTexts) -> list[list[int]]:
    return [data.ids[a:b].tolist() for a, b in zip(data.starts, data.starts[1:], strict=False)]


@given(TEXTS, st.data())
def test_select_gives_the_rows_in_the_order_asked_for(rows, data):
    indices = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=12))
    chosen = _texts(rows).select(np.array(indices, np.int64))
    assert _rows(chosen) == [rows[i] for i in indices]
    assert chosen.labels.tolist() == indices
    assert chosen.lengths.tolist() == [len(rows[i]) for i in indices]
    assert len(chosen) == len(indices)


@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_concatenate_gives_one_after_the_other(parts):
    first, *others = (_texts(rows) for rows in parts)
    whole = first.concatenate(others)
    assert _rows(whole) == [row for rows in parts for row in rows]
    assert whole.labels.tolist() == [i for rows in parts for i in range(len(rows))]


def test_tokenize_is_the_tokenizer_row_by_row(minilm: BaseModel, texts: list[str]):
    examples = TextExamples(tuple(texts[:20]), np.arange(20, dtype=np.int64))
    data = tokenize(minilm.tokenizer, examples, max_length=9)
    singly = [minilm.tokenizer(t, truncation=True, max_length=9)["input_ids"] for t in texts[:20]]
    assert _rows(data) == singly
    assert max(data.lengths) == 9
    none = tokenize(minilm.tokenizer, examples.select([]), max_length=9)
    assert (len(none), none.lengths.tolist()) == (0, [])


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_does_not_change_the_logits(
    minilm: BaseModel,
    fresh_classifier: Callable[..., EncoderClassifier],
    texts: list[str],
    pooling: str,
):
    module = fresh_classifier(3, pooling).eval()
    data = tokenize(minilm.tokenizer, TextExamples(tuple(texts[:17]), np.zeros(17, np.int64)), 64)
    task = TextClassification(minilm.tokenizer.pad_token_id)
    assert len(set(data.lengths.tolist())) > 10
    with torch.inference_mode():
        ids, mask, _ = task.batch(data, np.arange(17), CPU)
        together = module(ids, mask)
        alone = [module(*task.batch(data, np.array([row]), CPU)[:2])[0] for row in range(17)]
    assert (together - torch.stack(alone)).abs().max() < 1e-5


def test_batch_is_what_the_tokenizer_pads(minilm: BaseModel, texts: list[str]):
    data = tokenize(minilm.tokenizer, TextExamples(tuple(texts), np.arange(80)), 64)
    rows = np.array([3, 11, 7])
    pad_id = minilm.tokenizer.pad_token_id
    ids, mask, labels = TextClassification(pad_id).batch(data, rows, CPU)
    theirs = minilm.tokenizer([texts[row] for row in rows], padding=True, return_tensors="pt")
    assert torch.equal(ids, theirs["input_ids"])
    assert torch.equal(mask, theirs["attention_mask"])
    assert labels.tolist() == rows.tolist()


class _Head(nn.Module):
    """Logits from the first token, so that the loss can be computed by hand."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(1, labels)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.classifier(ids[:, :1].float() / 10)


DATA = _texts([[5, 1], [9], [2, 2, 2], [7], [1]], [0, 2, 2, 0, 2])


def test_loss_is_minus_the_log_of_the_softmax():
    module = _Head(4)
    task = TextClassification(0)
    loss = task.loss(module, task.batch(DATA, np.arange(5), CPU))
    with torch.no_grad():
        logits = module(*task.batch(DATA, np.arange(5), CPU)[:2]).double().numpy()
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -np.log(softmax[np.arange(5), DATA.labels]).mean()
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_evaluation_sums_the_same_loss_and_gives_the_likeliest_labels():
    module = _Head(4)
    task = TextClassification(0)
    found = task.outputs(module, task.batch(DATA, np.arange(5), CPU))
    with torch.no_grad():
        logits = module(*task.batch(DATA, np.arange(5), CPU)[:2])
    expected = functional.cross_entropy(logits, torch.from_numpy(DATA.labels)).item() * 5
    assert found.loss_sum.item() == pytest.approx(expected, rel=1e-6)
    assert found.predictions.tolist() == logits.numpy().argmax(1).tolist()
    assert found.labels.tolist() == DATA.labels.tolist()


def test_a_custom_task_collates_and_sums():
    inputs = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 0.5]])
    data = Rows([(inputs[i], target) for i, target in enumerate([1, 0, 1])])
    module = nn.Linear(2, 2)
    task = CustomTask()
    batch = task.batch(data, np.array([2, 0]), CPU)
    assert torch.equal(batch[0], inputs[[2, 0]])
    found = task.outputs(module, batch)
    logits = module(inputs[[2, 0]])
    expected = functional.cross_entropy(logits, torch.tensor([1, 1]), reduction="sum")
    assert found.loss_sum.item() == pytest.approx(expected.item(), rel=1e-6)
    assert found.predictions.tolist() == logits.argmax(1).tolist()
    assert found.labels.tolist() == [1, 1]
    assert class_targets(data.rows).tolist() == [1, 0, 1]


def test_a_custom_task_with_numbers_as_targets_has_no_classes():
    data = Rows([(torch.ones(2) * i, torch.tensor(i / 2)) for i in range(4)])
    task = CustomTask(lambda module, batch: (module(batch[0])[:, 0] - batch[1]).square().mean())
    assert class_targets(data.rows).tolist() == []
    module = nn.Linear(2, 1, bias=False)
    nn.init.constant_(module.weight, 0.5)
    found = task.outputs(module, task.batch(data, np.arange(4), CPU))
    assert found.predictions is found.labels is None
    assert found.loss_sum.item() == pytest.approx(sum((i - i / 2) ** 2 for i in range(4)))


def test_rows_select_and_concatenate():
    left, right = Rows(list("abc")), Rows(list("de"))
    whole = left.concatenate([right])
    assert [whole.rows[i] for i in range(len(whole))] == list("abcde")
    assert list(whole.select(np.array([4, 0])).rows) == ["e", "a"]
    assert whole.lengths.tolist() == [1] * 5
