"""Training on a device against training with PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest

from fedtune.data import TextExamples
from fedtune.deploy.edge_site import MomentFile
from fedtune.edge.artifacts import EdgeArtifacts, Precision
from fedtune.edge.devices import Runtime, make_trainer
from fedtune.edge.engines import Engine
from fedtune.edge.texts import TextGradients
from fedtune.edge.tokens import EdgeTokenizer
from fedtune.edge.trainer import EdgeSettings, EdgeTrainer
from fedtune.errors import ConfigError, TrainingError
from fedtune.simulation.job import TextModel
from fedtune.train.private import RecordPrivacy
from fedtune.train.texts import TokenizedTexts, padded
from fedtune.train.torch_trainer import TorchSettings, TorchTrainer
from fedtune.train.trainer import LocalPlan

if TYPE_CHECKING:
    from edge_built import Built

RUNTIMES: list[Runtime] = ["ort", "stepgraph"]


@pytest.fixture(scope="module")
def rows(texts: list[str]) -> TextExamples:
    """Texts with labels that can be learned."""
    words = ("fracture", "renal", "sepsis")
    labels = [sum(word in text for word in words) % 3 for text in texts]
    return TextExamples(tuple(texts), np.array(labels, np.int64))


def _torch(model: TextModel, **settings: Any) -> TorchTrainer:
    return TorchTrainer(model.adapter, model.task, model.base.digest, TorchSettings(**settings))


def _edge(
    built: Built, runtime: Runtime, precision: Precision = "float32", **settings: Any
) -> EdgeTrainer:
    return make_trainer(built.artifacts, runtime, precision, 1, EdgeSettings(**settings))


def _plan(rows: int, steps: int, lr: float = 1e-3, size: int = 8) -> LocalPlan:
    rng = np.random.default_rng(0)
    batches = (rng.choice(rows, size, replace=False) for _ in range(steps))
    return LocalPlan(batches, iter([lr] * steps), 7, size)


def _start(model: TextModel) -> np.ndarray:
    before = model.adapter.read()
    noise = np.random.default_rng(1).normal(0, 0.02, before.size)
    return before + noise.astype(np.float32)


def test_texts_become_the_tokens_that_transformers_makes(tiny: Built, rows: TextExamples) -> None:
    odd = ("", "  ", "naïve Kafé 東京 🙂", "word " * 200, "a\u0000b", "[MASK] [SEP] x")
    examples = TextExamples((*rows.texts, *odd), np.zeros(len(rows.texts) + len(odd), np.int64))
    expected = tiny.model.prepare(examples)
    found = EdgeTokenizer(tiny.artifacts, tiny.artifacts.manifest.max_length).prepare(examples)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.starts, expected.starts)
    assert found.lengths.max() == 64


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(("optimizer", "proximal"), [("adamw", 0.0), ("sgd", 0.0), ("sgd", 5.0)])
def test_a_round_ends_in_the_adapter_of_torch(
    tiny: Built,
    rows: TextExamples,
    runtime: Runtime,
    optimizer: Literal["adamw", "sgd"],
    proximal: float,
) -> None:
    data = tiny.model.prepare(rows)
    start = _start(tiny.model)
    settings: dict[str, Any] = {
        "optimizer": optimizer,
        "weight_decay": 0.02,
        "max_grad_norm": 0.5,
    }
    lr = 1e-3 if optimizer == "adamw" else 0.05
    theirs, ours = (
        trainer.train(start, data, replace(_plan(len(data), 30, lr), proximal=proximal))
        for trainer in (_torch(tiny.model, **settings), _edge(tiny, runtime, **settings))
    )
    moved = np.abs(theirs.adapter - start).max()
    assert moved > 0.005
    assert np.abs(ours.adapter - theirs.adapter).max() < 2e-4
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-4)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_batch_in_parts_has_the_gradient_of_the_whole(
    tiny: Built, rows: TextExamples, runtime: Runtime
) -> None:
    data = tiny.model.prepare(rows)
    start = _start(tiny.model)
    whole = _edge(tiny, runtime, optimizer="sgd").train(start, data, _plan(len(data), 5, 0.05))
    for parts in (1, 3):
        trainer = _edge(tiny, runtime, optimizer="sgd", micro_batch=parts)
        found = trainer.train(start, data, _plan(len(data), 5, 0.05))
        assert np.abs(found.adapter - whole.adapter).max() < 1e-6
        assert found.loss == pytest.approx(whole.loss, abs=1e-6)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 2), (1, 64), (7, 9), (16, 33)])
def test_batches_may_have_any_size(tiny: Built, runtime: Runtime, batch: int, tokens: int) -> None:
    rng = np.random.default_rng(2)
    ids = [rng.integers(1000, 2000, tokens).tolist() for _ in range(batch)]
    data = TokenizedTexts.of(ids, rng.integers(0, 3, batch))
    start = _start(tiny.model)
    plan = [LocalPlan(iter([np.arange(batch)]), iter([0.1]), 0) for _ in range(2)]
    theirs = _torch(tiny.model, optimizer="sgd").train(start, data, plan[0])
    ours = _edge(tiny, runtime, optimizer="sgd").train(start, data, plan[1])
    assert np.abs(ours.adapter - theirs.adapter).max() < 1e-5
    assert np.abs(ours.adapter - start).max() > 1e-3


def _engine(trainer: EdgeTrainer) -> Engine:
    model = trainer._model
    assert isinstance(model, TextGradients)
    return model._engine


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_labels_that_are_padding_do_not_count(
    tiny: Built, rows: TextExamples, runtime: Runtime
) -> None:
    data = tiny.model.prepare(rows)
    start = _start(tiny.model)
    engine = _engine(_edge(tiny, runtime))
    batch = padded(data, np.arange(16, 24), 0)
    some = batch._replace(labels=np.where(np.arange(8) < 5, batch.labels, -100))
    only = padded(data, np.arange(16, 21), 0)
    loss, gradient = engine.gradient(start, some)
    expected_loss, expected = engine.gradient(start, only)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_both_runtimes_and_precisions_learn_alike(tiny: Built, rows: TextExamples) -> None:
    data = tiny.model.prepare(rows)
    start = tiny.model.adapter.read()
    ends = {
        (runtime, precision): _edge(tiny, runtime, precision).train(
            start, data, _plan(len(data), 20, 5e-3)
        )
        for runtime in RUNTIMES
        for precision in ("float32", "int8")
    }
    for precision in ("float32", "int8"):
        first, second = (ends[runtime, precision].adapter for runtime in RUNTIMES)
        assert np.abs(first - second).max() < 5e-4
    exact, rounded = ends["ort", "float32"], ends["ort", "int8"]
    assert rounded.loss == pytest.approx(exact.loss, abs=0.01)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_evaluation_is_that_of_torch(tiny: Built, rows: TextExamples, runtime: Runtime) -> None:
    data = tiny.model.prepare(rows)
    start = _start(tiny.model)
    theirs = _torch(tiny.model).evaluate(start, data)
    for micro_batch in (1 << 16, 7):
        ours = _edge(tiny, runtime, micro_batch=micro_batch).evaluate(start, data)
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
        assert ours.correct == theirs.correct
        np.testing.assert_array_equal(ours.predictions, theirs.predictions)
        np.testing.assert_array_equal(ours.labels, theirs.labels)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_dropout_is_noise_that_a_seed_repeats(
    tiny_with_dropout: Built, rows: TextExamples, runtime: Runtime
) -> None:
    built = tiny_with_dropout
    data = built.model.prepare(rows)
    start = _start(built.model)
    trainer = _edge(built, runtime)

    def train(seed: int) -> Any:
        plan = _plan(len(data), 12)
        return trainer.train(start, data, LocalPlan(plan.batches, plan.learning_rates, seed))

    first, again, other = train(3), train(3), train(4)
    np.testing.assert_array_equal(first.adapter, again.adapter)
    assert np.abs(first.adapter - other.adapter).max() > 1e-4
    torch = _torch(built.model)
    losses = [torch.train(start, data, _plan(len(data), 12)).loss or 0.0 for _ in range(1)]
    for seed in range(5, 10):
        plan = _plan(len(data), 12)
        found = torch.train(start, data, LocalPlan(plan.batches, plan.learning_rates, seed))
        losses.append(found.loss or 0.0)
    spread = max(losses) - min(losses)
    for found in (first, other):
        assert abs(found.loss - np.mean(losses)) < 3 * spread + 1e-4
    # And none where it is evaluated.
    ours, theirs = trainer.evaluate(start, data), torch.evaluate(start, data)
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)


def test_dropout_is_refused_with_privacy_of_records(tiny_with_dropout: Built) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.dropout = 0"):
        _edge(tiny_with_dropout, "stepgraph", record_privacy=RecordPrivacy(1.0, 1.0))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_privacy_of_records_takes_the_step_of_torch(
    tiny: Built, rows: TextExamples, runtime: Runtime
) -> None:
    """Without noise, and with all rows drawn: so both have the same sum of clipped gradients."""
    data = tiny.model.prepare(rows).select(np.arange(20))
    start = _start(tiny.model)
    privacy = RecordPrivacy(0.0, 0.05)
    ends = []
    for trainer in (
        _torch(tiny.model, optimizer="sgd", record_privacy=privacy),
        _edge(tiny, runtime, optimizer="sgd", record_privacy=privacy),
    ):
        result = trainer.train(start, data, LocalPlan(iter(()), iter([5.0]), 0, 20))
        assert result.loss is None
        ends.append(result.adapter)
    assert np.abs(ends[0] - start).max() > 0.005
    assert np.abs(ends[1] - ends[0]).max() < 1e-5
    noisy = _edge(tiny, runtime, optimizer="sgd", record_privacy=RecordPrivacy(2.0, 0.05))
    found = noisy.train(start, data, LocalPlan(iter(()), iter([1.0]), 0, 20)).adapter
    clean = start + (ends[1] - start) / 5
    deviation = float(np.std(found - clean))
    assert deviation == pytest.approx(2.0 * 0.05 / 20, rel=0.1)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_loss_that_is_not_finite_is_told(
    tiny: Built, rows: TextExamples, runtime: Runtime
) -> None:
    data = tiny.model.prepare(rows)
    with pytest.raises(TrainingError, match=r"lower train\.lr"):
        _edge(tiny, runtime, optimizer="sgd").train(
            _start(tiny.model), data, _plan(len(data), 8, 1e30)
        )


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_a_device_that_this_build_does_not_know_is_told(
    tiny: Built, runtime: Runtime, device: str
) -> None:
    with pytest.raises(ConfigError, match=f"machine.device = {device}: onnxruntime"):
        make_trainer(tiny.artifacts, runtime, "int8", 1, EdgeSettings(), device=device)


def test_training_leaves_all_files_as_they_were(tiny: Built, rows: TextExamples) -> None:
    for runtime in RUNTIMES:
        data = tiny.model.prepare(rows)
        _edge(tiny, runtime, "int8").train(tiny.model.adapter.read(), data, _plan(len(data), 2))
    again = EdgeArtifacts(tiny.folder)
    for name in again.manifest.files:
        again.path(name)


def _rounds(trainer: EdgeTrainer, data: TokenizedTexts, start: np.ndarray) -> Iterator[np.ndarray]:
    adapter = start
    for _ in range(2):
        adapter = trainer.train(adapter, data, _plan(len(data), 4)).adapter
        yield adapter


def test_moments_last_one_round_or_are_kept(
    tiny: Built, rows: TextExamples, tmp_path: Path
) -> None:
    data = tiny.model.prepare(rows)
    start = _start(tiny.model)
    fresh = list(_rounds(_edge(tiny, "stepgraph"), data, start))

    def keeping() -> EdgeTrainer:
        kept = MomentFile(tmp_path / "moments.safetensors")
        return make_trainer(tiny.artifacts, "stepgraph", "float32", 1, EdgeSettings(), kept)

    kept = list(_rounds(keeping(), data, start))
    np.testing.assert_array_equal(kept[0], fresh[0])
    assert np.abs(kept[1] - fresh[1]).max() > 1e-4
    # The same when the process is another one in the second round.
    (tmp_path / "moments.safetensors").unlink()
    first = keeping().train(start, data, _plan(len(data), 4)).adapter
    second = keeping().train(first, data, _plan(len(data), 4)).adapter
    np.testing.assert_array_equal(second, kept[1])


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff" * 64])
def test_a_broken_file_of_moments_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "moments.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        MomentFile(path).load(5)


def test_moments_of_another_adapter_are_told(tmp_path: Path) -> None:
    store = MomentFile(tmp_path / "moments.safetensors")
    store.save(store.load(5))
    assert store.load(5).steps == 0
    with pytest.raises(ConfigError, match="another adapter"):
        store.load(6)
