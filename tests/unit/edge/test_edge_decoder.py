"""Artifacts of a causal language model against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from edge_built import Built

from fedtune.data import TextExamples
from fedtune.edge import artifacts as files
from fedtune.edge.build import artifacts
from fedtune.edge.build.int8 import quantize
from fedtune.edge.build.model import EdgeModel
from fedtune.edge.devices import Runtime, make_trainer, open_engine
from fedtune.edge.tokens import EdgeTokenizer
from fedtune.edge.trainer import EdgeSettings, EdgeTrainer
from fedtune.edge.verify import verify
from fedtune.errors import ArtifactError, BaseModelError
from fedtune.train.texts import IGNORED, Batch, TokenizedTexts, with_next_tokens
from fedtune.train.torch_trainer import TorchSettings, TorchTrainer
from fedtune.train.trainer import LocalPlan

if TYPE_CHECKING:
    from fedtune.config import Config
    from fedtune.simulation.job import TextModel
    from fedtune.types import Float32Vector

RUNTIMES: list[Runtime] = ["ort", "stepgraph"]
ROWS = np.array([3, 16, 0, 40, 33])  # of different lengths, so that there is padding


@pytest.fixture(scope="module")
def decoder(decoder_artifacts: tuple[Path, Config, TextModel]) -> Built:
    """Artifacts of the tiny decoder. Do not write to them."""
    return Built(*decoder_artifacts)


@pytest.fixture(scope="module")
def data(decoder: Built, texts: list[str]) -> TokenizedTexts:
    return decoder.model.prepare(TextExamples(tuple(texts), np.zeros(len(texts), np.int64)))


@pytest.fixture(scope="module")
def start(decoder: Built) -> Float32Vector:
    before = decoder.model.adapter.read()
    noise = np.random.default_rng(1).normal(0, 0.05, before.size)
    return before + noise.astype(np.float32)


def _torch(built: Built) -> TorchTrainer:
    model = built.model
    return TorchTrainer(model.adapter, model.task, model.base.digest, TorchSettings())


def _edge(built: Built, runtime: Runtime, **settings: Any) -> EdgeTrainer:
    return make_trainer(built.artifacts, runtime, "float32", 1, EdgeSettings(**settings))


def _torch_gradient(
    built: Built, batch: Batch, adapter: Float32Vector
) -> tuple[float, Float32Vector]:
    import torch

    model = built.model
    model.adapter.write(adapter)
    model.adapter.zero_grad()
    loss = model.task.loss(
        model.adapter.module.eval(), tuple(torch.from_numpy(array) for array in batch)
    )
    loss.backward()
    return float(loss.detach()), model.adapter.read_gradient()


def test_the_manifest_says_what_the_model_is_for(decoder: Built) -> None:
    found = decoder.artifacts.manifest
    vocabulary = decoder.model.base.config.vocab_size
    assert found.task == "causal-lm"
    assert found.outputs == vocabulary
    assert found.end_id == decoder.model.end_id
    forward = found.graphs[f"float32/{files.FORWARD}"]
    assert forward.outputs[0].shape == ("labelled", vocabulary)
    assert found.graphs[f"float32/{files.STEP}"].inputs[-1].shape == ("labelled",)
    decoder.artifacts.check(decoder.config)
    with pytest.raises(ArtifactError, match="task"):
        decoder.artifacts.check(
            decoder.config.model_copy(
                update={
                    "base": decoder.config.base.model_copy(update={"task": "text-classification"})
                }
            )
        )


def test_texts_become_the_same_tokens_with_their_end(decoder: Built, texts: list[str]) -> None:
    odd = ("naïve Kafé 東京 🙂", "word " * 200, "a\u0000b", "<|end|> x")
    examples = TextExamples((*texts, *odd), np.zeros(len(texts) + len(odd), np.int64))
    expected = decoder.model.prepare(examples)
    found = EdgeTokenizer(decoder.artifacts, 40).prepare(examples)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.starts, expected.starts)
    assert found.lengths.max() == 40


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_loss_and_gradient_are_those_of_torch(
    decoder: Built, data: TokenizedTexts, start: Float32Vector, runtime: Runtime
) -> None:
    batch = with_next_tokens(data, ROWS, decoder.model.pad_id)
    assert (batch.mask == 0).any()
    assert (batch.labels == IGNORED).any()
    expected_loss, expected = _torch_gradient(decoder, batch, start)
    folder = decoder.folder / "float32"
    engine = open_engine(runtime, folder, decoder.artifacts.tensors, 1, dropout=False)
    loss, gradient = engine.gradient(start, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert np.abs(gradient - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_round_ends_in_the_adapter_of_torch(
    decoder: Built, data: TokenizedTexts, start: Float32Vector, runtime: Runtime
) -> None:
    def plan() -> LocalPlan:
        rng = np.random.default_rng(0)
        return LocalPlan((rng.permutation(80)[:6] for _ in range(5)), iter([2e-3] * 5), 0, 6)

    expected = _torch(decoder).train(start, data, plan())
    found = _edge(decoder, runtime, micro_batch=4).train(start, data, plan())
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    moved = np.abs(expected.adapter - start).max()
    assert np.abs(found.adapter - expected.adapter).max() < 1e-3 * moved


def test_a_batch_in_parts_weighs_each_token_the_same(
    decoder: Built, data: TokenizedTexts, start: Float32Vector
) -> None:
    """Parts of short texts have fewer tokens, and count less."""
    by_length = np.argsort(data.lengths)[[0, 1, 2, -3, -2, -1]]

    def plan() -> LocalPlan:
        return LocalPlan(iter([by_length]), iter([1.0]), 0, 6)

    whole = _edge(decoder, "stepgraph", optimizer="sgd").train(start, data, plan())
    parts = _edge(decoder, "stepgraph", optimizer="sgd", micro_batch=3).train(start, data, plan())
    moved = np.abs(whole.adapter - start).max()
    assert np.abs(whole.adapter - parts.adapter).max() < 1e-4 * moved
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)


def test_evaluation_is_that_of_torch(
    decoder: Built, data: TokenizedTexts, start: Float32Vector
) -> None:
    rows = data.select(np.arange(0, 80, 5))
    expected, found = (t.evaluate(start, rows) for t in (_torch(decoder), _edge(decoder, "ort")))
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert (found.examples, found.accuracy) == (16, None)


def test_this_machine_computes_what_torch_did(decoder: Built) -> None:
    checks = list(verify(decoder.artifacts))
    assert [check.what for check in checks if not check.passed] == []
    assert {"ort float32: gradient", "stepgraph int8: gradient, relative"} <= {
        check.what for check in checks
    }


def test_the_output_layer_is_the_table_of_embeddings_and_stored_once(decoder: Built) -> None:
    """In each precision, whatever the runtime does to a graph before it is written."""
    config = decoder.model.base.config
    shape = [config.vocab_size, config.hidden_size]
    for name in (files.FORWARD, files.STEP, files.TRAINING):
        graph = onnx.load(decoder.folder / "float32" / name, load_external_data=False).graph
        (table,) = [t.name for t in graph.initializer if sorted(t.dims) == sorted(shape)]
        users = {node.op_type for node in graph.node if table in node.input}
        assert users == {"Gather", "Gemm"}


def test_a_table_that_is_an_output_layer_too_is_rounded_once() -> None:
    rng = np.random.default_rng(2)
    vocabulary, hidden = 1500, 64
    table = rng.normal(size=(vocabulary, hidden)).astype(np.float32)
    table[7] *= 50  # rows have scales of their own
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        tied (int64[n] ids) => (float[n,{hidden}] rows, float[n,{vocabulary}] logits) {{
            rows = Gather(table, ids)
            logits = Gemm<transB=1>(rows, table)
        }}"""
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(table, "table"))
    assert quantize(model, ()) == 1
    large = [t for t in model.graph.initializer if len(t.dims) == 2 and t.dims[1] > 1]
    assert [(t.data_type, list(t.dims)) for t in large] == [
        (onnx.TensorProto.INT8, [vocabulary, hidden])
    ]
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    ids = np.array([7, 3, 1499])
    rows, logits = session.run(None, {"ids": ids})
    half_a_level = np.abs(table).max(1, keepdims=True) / 254 * 1.001
    assert (np.abs(rows - table[ids]) <= half_a_level[ids]).all()
    rounded = session.run(["rows"], {"ids": np.arange(vocabulary)})[0]
    np.testing.assert_allclose(logits, rows @ rounded.T, rtol=1e-4, atol=1e-2)


def test_a_model_too_large_for_a_graph_is_refused_before_anything_is_done(
    decoder: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "LARGEST_MODEL", 100_000)
    model = decoder.model
    parts = EdgeModel(model.base, model.adapter, model.pad_id, model.max_length)
    with pytest.raises(BaseModelError, match=r"0\.0 GB of weights"):
        artifacts.build(decoder.config, parts, tmp_path / "out", lambda _text: None)
    assert list(tmp_path.iterdir()) == []
