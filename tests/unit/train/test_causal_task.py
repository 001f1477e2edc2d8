"""The task of a causal language model against transformers' own loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.config import Config, parse_config
from fedtune.data import TextExamples
from fedtune.errors import ConfigError, DataError
from fedtune.simulation.job import TextModel
from fedtune.train.texts import ended, next_tokens
from fedtune.train.torch_trainer import TorchSettings, TorchTrainer
from fedtune.train.trainer import LocalPlan

CPU = torch.device("cpu")


def _config(base: Path, *overrides: str) -> Config:
    own = [f'base.path="{base}"', "base.task=causal-lm", "base.max-length=48", "adapter.rank=4"]
    return parse_config("", "test", [*own, *overrides])


@pytest.fixture(scope="module")
def model(tiny_decoder: Path) -> TextModel:
    """The tiny decoder with an adapter."""
    return TextModel(_config(tiny_decoder), 0)


@pytest.fixture(scope="module")
def examples(texts: list[str]) -> TextExamples:
    return TextExamples(tuple(texts), np.zeros(len(texts), np.int64))


def _transformers_loss(model: TextModel, rows: list[list[int]]) -> float:
    """What the model itself makes of labels, which it shifts by itself."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [model.pad_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        labels = ids.masked_fill(mask == 0, -100)
        return float(model.adapter.module(input_ids=ids, attention_mask=mask, labels=labels).loss)


def test_the_label_of_each_token_is_the_one_that_follows() -> None:
    ids = np.array([[5, 6, 7, 8], [5, 9, 0, 0]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = next_tokens(ids, mask)
    np.testing.assert_array_equal(found, [6, 7, 8, -100, 9, -100, -100, -100])


def test_a_text_ends_unless_it_was_cut() -> None:
    assert ended([[4, 5], [4, 5, 6]], 9, 3) == [[4, 5, 9], [4, 5, 6]]
    with pytest.raises(DataError, match="no token"):
        ended([[4], []], 9, 3)


def test_prepared_rows_are_the_tokens_of_the_text_and_its_end(
    model: TextModel, examples: TextExamples
) -> None:
    data = model.prepare(examples)
    for place in (0, 17):
        row = data.ids[data.starts[place] : data.starts[place + 1]].tolist()
        assert model.base.tokenizer.decode(row) == f"{examples.texts[place]}<|end|>"
    long = TextExamples(("x y z " * 40,), np.zeros(1, np.int64))
    cut = model.prepare(long)
    assert len(cut.ids) == 48
    assert model.end_id not in cut.ids


def test_training_loss_is_that_of_transformers(model: TextModel, examples: TextExamples) -> None:
    data, rows = model.prepare(examples), np.array([3, 16, 0, 40])
    batch = model.task.batch(data, rows, CPU)
    with torch.no_grad():
        found = float(model.task.loss(model.adapter.module, batch))
    tokens = [data.ids[data.starts[row] : data.starts[row + 1]].tolist() for row in rows]
    assert found == pytest.approx(_transformers_loss(model, tokens), rel=1e-5)


def test_evaluation_is_the_mean_of_each_texts_own_loss(
    model: TextModel, examples: TextExamples
) -> None:
    data = model.prepare(examples).select(np.arange(20))
    trainer = TorchTrainer(model.adapter, model.task, "ab" * 32, TorchSettings())
    found = trainer.evaluate(model.adapter.read(), data)
    each = [
        _transformers_loss(model, [data.ids[start:stop].tolist()])
        for start, stop in zip(data.starts, data.starts[1:], strict=False)
    ]
    assert found.loss == pytest.approx(np.mean(each), rel=1e-5)
    assert found.examples == 20
    assert found.accuracy is None


def test_a_few_texts_are_learned_by_heart(model: TextModel, examples: TextExamples) -> None:
    data = model.prepare(examples).select(np.arange(8, 12))
    before = model.adapter.read()
    trainer = TorchTrainer(model.adapter, model.task, "ab" * 32, TorchSettings())
    start = trainer.evaluate(before, data).loss
    plan = LocalPlan(iter([np.arange(4)] * 60), iter([0.02] * 60), 0)
    trained = trainer.train(before, data, plan).adapter
    assert trainer.evaluate(trained, data).loss < start / 2
    model.adapter.write(before)


def test_only_query_and_value_have_matrices_and_there_is_no_head(model: TextModel) -> None:
    names = {tensor.name for tensor in model.adapter.manifest.tensors}
    layers = "base_model.model.model.layers"
    assert names == {
        f"{layers}.{layer}.self_attn.{target}.lora_{side}.weight"
        for layer in (0, 1)
        for target in ("q_proj", "v_proj")
        for side in "AB"
    }


@pytest.mark.parametrize("override", ['data.labels=["a","b"]', 'base.pooling="cls"'])
def test_what_belongs_to_classifiers_is_refused(tiny_decoder: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="text-classification"):
        _config(tiny_decoder, override)
