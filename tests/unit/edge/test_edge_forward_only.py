"""Training without gradients on a device, against the same with PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save

from fedtune.config import parse_config
from fedtune.data import TextExamples
from fedtune.edge.artifacts import EdgeArtifacts
from fedtune.edge.devices import fit, make_losses
from fedtune.errors import ArtifactError
from fedtune.train.forward_only import ForwardOnlyTrainer, directions_of
from fedtune.train.torch_trainer import TorchSettings, TorchTrainer
from fedtune.train.trainer import LocalPlan

if TYPE_CHECKING:
    from edge_built import Built

FORWARD_ONLY = (
    'data.labels=["a","b","c"]',
    "base.max-length=64",
    "train.method=forward-only",
    "train.optimizer=sgd",
    "train.directions=64",
)


@pytest.fixture(scope="module")
def rows(texts: list[str]) -> TextExamples:
    """Texts with labels that can be learned."""
    words = ("fracture", "renal", "sepsis")
    labels = [sum(word in text for word in words) % 3 for text in texts]
    return TextExamples(tuple(texts), np.array(labels, np.int64))


@pytest.fixture(scope="module")
def build_initial(tiny: Built) -> Callable[[int], np.ndarray]:
    """The adapter of a seed, before any training."""
    from fedtune.simulation.job import TextModel

    def make(seed: int) -> np.ndarray:
        config = tiny.config.model_copy(update={"seed": seed})
        return TextModel(config, 3).adapter.read()

    return make


def _config(*overrides: str) -> Any:
    return parse_config("", "test", [*FORWARD_ONLY, *overrides])


def _plan(rows: int, steps: int) -> LocalPlan:
    rng = np.random.default_rng(0)
    batches = (rng.choice(rows, 8, replace=False) for _ in range(steps))
    return LocalPlan(batches, iter([2.0] * steps), 7)


def _device(artifacts: EdgeArtifacts, precision: Any, micro_batch: int = 8) -> ForwardOnlyTrainer:
    directions = directions_of(_config(), artifacts.tensors, artifacts.initial())
    losses = make_losses(artifacts, precision, 1, micro_batch)
    return ForwardOnlyTrainer(losses, directions, 0.1)


def _torch(built: Built) -> ForwardOnlyTrainer:
    model = built.model
    trainer = TorchTrainer(model.adapter, model.task, model.base.digest, TorchSettings("sgd"))
    # The model may have been trained by other tests: the artifacts have what it began with.
    directions = directions_of(_config(), model.adapter.manifest, built.artifacts.initial())
    return ForwardOnlyTrainer(trainer, directions, 0.1)


def test_a_round_ends_in_the_coordinates_of_torch(tiny: Built, rows: TextExamples) -> None:
    data = tiny.model.prepare(rows)
    zero = np.zeros(64, np.float32)
    theirs = _torch(tiny).train(zero, data, _plan(len(data), 100))
    ours = _device(tiny.artifacts, "float32").train(zero, data, _plan(len(data), 100))
    assert np.linalg.norm(theirs.adapter) > 0.5
    assert np.abs(ours.adapter - theirs.adapter).max() < 1e-4 * np.linalg.norm(theirs.adapter)
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-4)
    assert theirs.loss is not None
    before = _torch(tiny).evaluate(zero, data)
    after = _device(tiny.artifacts, "float32").evaluate(ours.adapter, data)
    assert after.loss < before.loss - 0.02


def test_rounded_weights_train_the_same_way(tiny: Built, rows: TextExamples) -> None:
    data = tiny.model.prepare(rows)
    zero = np.zeros(64, np.float32)
    theirs = _torch(tiny).train(zero, data, _plan(len(data), 60)).adapter
    ours = _device(tiny.artifacts, "int8").train(zero, data, _plan(len(data), 60)).adapter
    cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
    assert cosine > 0.95


def test_a_batch_in_parts_has_the_loss_of_the_whole(tiny: Built, rows: TextExamples) -> None:
    data = tiny.model.prepare(rows)
    zero = np.zeros(64, np.float32)
    whole = _device(tiny.artifacts, "float32").train(zero, data, _plan(len(data), 10))
    for parts in (1, 3):
        trainer = _device(tiny.artifacts, "float32", parts)
        found = trainer.train(zero, data, _plan(len(data), 10))
        assert np.abs(found.adapter - whole.adapter).max() < 1e-4
        assert found.loss == pytest.approx(whole.loss, abs=1e-6)


def test_only_the_forward_graph_is_needed(tiny: Built, rows: TextExamples, tmp_path: Path) -> None:
    needed = ("int8/forward.onnx", "int8/base.bin", "initial.safetensors")
    (tmp_path / "int8").mkdir()
    for name in ("manifest.json", *needed):
        (tmp_path / name).write_bytes((tiny.folder / name).read_bytes())
    data, zero = tiny.model.prepare(rows), np.zeros(64, np.float32)
    found = _device(EdgeArtifacts(tmp_path), "int8").train(zero, data, _plan(len(data), 3))
    assert np.count_nonzero(found.adapter) == 3


def test_the_initial_adapter_is_that_of_the_seed(
    tiny: Built, tmp_path: Path, build_initial: Callable[[int], np.ndarray]
) -> None:
    np.testing.assert_array_equal(tiny.artifacts.initial(), build_initial(0))
    assert (tiny.artifacts.initial() != build_initial(1)).any()
    tiny.artifacts.check(_config())
    with pytest.raises(ArtifactError, match="seed"):
        tiny.artifacts.check(_config("seed=1"))
    # With gradients, the first round brings the initial adapter.
    tiny.artifacts.check(parse_config("", "test", [*FORWARD_ONLY[:2], "seed=1"]))
    for name in ("manifest.json", "initial.safetensors"):
        (tmp_path / name).write_bytes((tiny.folder / name).read_bytes())
    content = bytearray((tmp_path / "initial.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "initial.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match="initial"):
        EdgeArtifacts(tmp_path).initial()


def test_an_initial_adapter_of_other_tensors_is_refused(tiny: Built, tmp_path: Path) -> None:
    manifest = json.loads((tiny.folder / "manifest.json").read_text())
    other = save({"x": np.zeros(3, np.float32)})
    (tmp_path / "initial.safetensors").write_bytes(other)
    entry = {"size": len(other), "sha256": sha256(other).hexdigest()}
    manifest["files"]["initial.safetensors"] = entry
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="initial"):
        EdgeArtifacts(tmp_path).initial()


def test_it_takes_less_memory_than_a_step_with_gradients(tiny: Built) -> None:
    memory = tiny.artifacts.manifest.memory
    forward, step = memory["forward/float32"], memory["stepgraph/float32"]
    rows, tokens = 16, 64
    grown, with_gradients = (m.peak(rows, tokens) - m.fixed for m in (forward, step))
    assert grown < 0.7 * with_gradients
    budget = step.peak(4, 64)
    assert fit(forward, budget, 64, 64)[0] > fit(step, budget, 64, 64)[0]
