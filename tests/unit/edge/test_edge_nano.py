"""NanoAdapters on a device against the same ones with PyTorch, in front of a real decoder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save

from fedtune.adapter.nano import Nano, Prompt, attach_nano
from fedtune.base.connector import Connector, load_connector
from fedtune.base.vision import VisionEncoder
from fedtune.config import Split
from fedtune.data.easy_vqa import public_captions
from fedtune.data.questions import NO_IMAGE, QuestionExamples
from fedtune.edge.artifacts import MANIFEST, REFERENCE, EdgeArtifacts
from fedtune.edge.nano import NanoQuestions, join, open_half, part
from fedtune.edge.questions import ImageReader, QuestionReader
from fedtune.edge.trainer import EdgeSettings, EdgeTrainer
from fedtune.edge.verify import verify
from fedtune.errors import ArtifactError, DataError
from fedtune.simulation.vision import VisionModel
from fedtune.train.cut import AcrossCut, InProcessBase
from fedtune.train.protection import protected
from fedtune.train.question_rows import EncodedQuestions
from fedtune.train.remote import Labels
from fedtune.train.torch_trainer import TorchSettings, TorchTrainer
from fedtune.train.trainer import LocalPlan
from fedtune.types import sha256_hex

if TYPE_CHECKING:
    from edge_built import NanoBuilt

ASKED = (
    "what color is the shape?",
    "is there a circle?",
    "",
    "does the image contain a blue shape in the picture, or not?",
    "what is in the image?",
)


@pytest.fixture(scope="module")
def model(nano: NanoBuilt) -> VisionModel:
    return nano.model()


@pytest.fixture(scope="module")
def start(model: VisionModel) -> np.ndarray:
    """Not as a run starts: nothing is zero. Whoever trains asks for it first."""
    before = model.adapter.read()
    return before + np.random.default_rng(1).normal(0, 0.1, before.size).astype(np.float32)


@pytest.fixture(scope="module")
def examples() -> QuestionExamples:
    """Questions of many lengths, one without words; every third has no image."""
    files = public_captions().files[:7]
    rows = np.arange(20)
    images = np.where(rows % 3 == 2, NO_IMAGE, rows % 7)
    questions = tuple(ASKED[row % 5] if images[row] >= 0 else ASKED[row % 2] for row in rows)
    return QuestionExamples(questions, images, (rows * 7) % 5, files)


@pytest.fixture(scope="module")
def rows(nano: NanoBuilt, model: VisionModel, examples: QuestionExamples) -> EncodedQuestions:
    """The device's, of the very features that PyTorch has."""
    reader = ImageReader(nano.artifacts, 1)
    reader.tokens = lambda _files: reader.connect(model.prepare(examples).features)  # type: ignore[method-assign]
    return QuestionReader(nano.artifacts, reader).prepare(examples)


def on_device(nano: NanoBuilt, remote: Any, labels: Labels = "server") -> NanoQuestions:
    artifacts = nano.artifacts
    digest = artifacts.cut.digest(artifacts.manifest.base_digest)
    return NanoQuestions(open_half(artifacts, 1), remote, labels, digest)


def trainer_of(model: VisionModel, **settings: Any) -> TorchTrainer:
    return TorchTrainer(model.adapter, model.task, model.digest, TorchSettings(**settings))


def plan_of(steps: int, lr: float, **more: Any) -> LocalPlan:
    rng = np.random.default_rng(0)
    batches = (rng.choice(20, 6, replace=False) for _ in range(steps))
    return LocalPlan(batches, iter(np.linspace(lr, lr / 2, steps).tolist()), 7, 6, **more)


def test_the_encoder_sees_what_pytorch_sees(nano: NanoBuilt) -> None:
    reader, module = ImageReader(nano.artifacts, 1), VisionEncoder().of_one_image()
    rng, largest = np.random.default_rng(0), 0.0
    for size in ((1, 1), (64, 64), (128, 128), (33, 250), (301, 40)):
        pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        with torch.inference_mode():
            expected = module(torch.from_numpy(pixels)).numpy()
        largest = max(largest, float(np.abs(reader.see(pixels) - expected).max()))
        assert expected.max() > 1
    assert largest < 2e-4


def test_an_images_tokens_are_those_of_pytorch(
    nano: NanoBuilt,
    model: VisionModel,
    examples: QuestionExamples,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up to features of which the last bit of half precision was rounded the other way."""
    features = model.prepare(examples).features
    with torch.inference_mode():
        expected = model.client.connector(torch.from_numpy(features.astype(np.float32))).numpy()
    reader = ImageReader(nano.artifacts, 1)
    np.testing.assert_allclose(reader.connect(features), expected, atol=1e-5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # nothing that another run has kept
    found = reader.tokens(examples.files)
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)


def test_a_device_reads_the_rows_that_pytorch_does(
    nano: NanoBuilt, model: VisionModel, examples: QuestionExamples, rows: EncodedQuestions
) -> None:
    expected = model.prepare(examples)
    np.testing.assert_array_equal(nano.artifacts.vocabulary()[rows.texts.ids], expected.texts.ids)
    np.testing.assert_array_equal(rows.texts.starts, expected.texts.starts)
    np.testing.assert_array_equal(rows.images, expected.images)
    np.testing.assert_array_equal(rows.labels, expected.labels)


def test_embeddings_stand_in_the_order_of_the_clients_half() -> None:
    torch.manual_seed(0)
    half = attach_nano(Connector(12, 16, 2), torch.nn.Embedding(30, 16), Nano(5), 0).module
    torch.nn.init.normal_(half.nano_text.up.weight)
    pictured, lengths = torch.tensor([True, False, False, True]), torch.tensor([4, 3, 6, 1])
    mask = (torch.arange(6) < lengths[:, None]).long()
    ids = torch.randint(1, 30, (4, 6))
    expected, counted = half(Prompt(torch.randn(4, 12), pictured, ids, mask))
    features = torch.randn(4, 12)
    image = half.nano_image(half.connector(features)).detach().requires_grad_()
    text = half.nano_text(half.embeddings(ids)).detach().requires_grad_()
    found = join(image.detach().numpy(), text.detach().numpy(), pictured.numpy())
    expected, counted = half(Prompt(features, pictured, ids, mask))
    counts = np.arange(8) < counted.numpy()[:, None]
    np.testing.assert_array_equal(found[counts], expected.detach().numpy()[counts])
    # And back: the gradient of a sum with weights is the weight of each place.
    slope = np.random.default_rng(0).normal(size=found.shape).astype(np.float32) * counts[..., None]
    torch.manual_seed(0)
    for row in range(4):
        order = [image[row], text[row]] if pictured[row] else [text[row], image[row]]
        (torch.cat(order) * torch.from_numpy(slope[row])).sum().backward()
    by_image, by_text = part(slope, 2, pictured.numpy())
    np.testing.assert_array_equal(by_image, image.grad)
    np.testing.assert_array_equal(by_text, text.grad)
    assert not by_image[1:3].any()


@pytest.mark.parametrize("labels", ["server", "client"])
def test_the_gradient_is_that_of_the_whole_model(
    nano: NanoBuilt,
    model: VisionModel,
    examples: QuestionExamples,
    rows: EncodedQuestions,
    start: np.ndarray,
    labels: Labels,
) -> None:
    chosen = np.array([0, 2, 5, 6, 7, 11])
    module, task = model.adapter.module, model.task
    model.adapter.write(start)
    model.adapter.zero_grad()
    batch = task.batch(model.prepare(examples), chosen, torch.device("cpu"))
    loss = task.loss(module, batch)
    loss.backward()
    expected = model.adapter.read_gradient()
    device = on_device(nano, InProcessBase(model.decoder), labels)
    found_loss, found = device.gradient(start, rows, chosen)
    assert found_loss == pytest.approx(float(loss.detach()), abs=1e-5)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Of rows without an image NanoAdapter-I learns nothing.
    _, found = device.gradient(start, rows, np.array([2, 5]))
    tensors = nano.artifacts.tensors.split(found)
    assert not any(value.any() for name, value in tensors.items() if "nano_image" in name)
    assert all(value.any() for name, value in tensors.items() if "nano_text" in name)


def test_the_gradient_goes_through_the_clipping_of_what_is_sent(
    nano: NanoBuilt,
    model: VisionModel,
    examples: QuestionExamples,
    rows: EncodedQuestions,
    start: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with PyTorch behind the same protection, whose noise is next to nothing here."""
    remote = protected(InProcessBase(model.decoder), Split(clip=1.0, eta=1e9))
    monkeypatch.setattr(model.task, "behind", AcrossCut(remote))
    chosen = np.arange(8)
    sgd = LocalPlan(iter([chosen]), iter([1.0]), 0)
    after = trainer_of(model, optimizer="sgd").train(start, model.prepare(examples), sgd)
    expected = start - after.adapter
    _, found = on_device(nano, remote).gradient(start, rows, chosen)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    _, unclipped = on_device(nano, InProcessBase(model.decoder)).gradient(start, rows, chosen)
    assert np.abs(unclipped - expected).max() > 1e-3


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize(
    ("optimizer", "lr", "more"),
    [
        ("adamw", 1e-2, {}),
        ("sgd", 0.1, {"proximal": 0.5}),
        ("adamw", 1e-2, {"fisher": True, "proximal": 0.1}),
    ],
)
def test_a_round_ends_in_the_adapter_of_torch(
    nano: NanoBuilt,
    model: VisionModel,
    examples: QuestionExamples,
    rows: EncodedQuestions,
    start: np.ndarray,
    labels: Labels,
    optimizer: Literal["adamw", "sgd"],
    lr: float,
    more: dict[str, Any],
) -> None:
    settings = {"optimizer": optimizer, "weight_decay": 0.02, "max_grad_norm": 0.5}
    with_torch = trainer_of(model, **settings)
    device = on_device(nano, InProcessBase(model.decoder), labels)
    on_edge = EdgeTrainer(nano.artifacts.tensors, device, EdgeSettings(**settings))
    assert on_edge.manifest == with_torch.manifest
    assert on_edge.base_digest == with_torch.base_digest
    theirs = with_torch.train(start, model.prepare(examples), plan_of(30, lr, **more))
    ours = on_edge.train(start, rows, plan_of(30, lr, **more))
    assert np.abs(theirs.adapter - start).max() > 0.05
    assert np.abs(ours.adapter - theirs.adapter).max() < 1e-4
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
    if more.get("fisher"):
        np.testing.assert_allclose(ours.fisher, theirs.fisher, rtol=1e-3, atol=1e-5)
    expected = with_torch.evaluate(theirs.adapter, model.prepare(examples))
    found = on_edge.evaluate(theirs.adapter, rows)
    assert found.loss == pytest.approx(expected.loss, abs=1e-5)
    np.testing.assert_array_equal(found.predictions, expected.predictions)
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert 0 < found.correct == expected.correct


def test_a_site_without_any_image_trains(
    nano: NanoBuilt, model: VisionModel, examples: QuestionExamples, start: np.ndarray
) -> None:
    alone = replace(examples, images=np.full(20, NO_IMAGE), files=())
    rows = QuestionReader(nano.artifacts, ImageReader(nano.artifacts, 1)).prepare(alone)
    assert rows.features.shape == (0, 2, 64)
    device = on_device(nano, InProcessBase(model.decoder))
    trainer = trainer_of(model)
    found = device.evaluate(start, rows)
    expected = trainer.evaluate(start, model.prepare(alone))
    assert found.loss == pytest.approx(expected.loss, abs=1e-5)


@pytest.mark.parametrize(
    ("question", "said"),
    [("word " * 30, "more than base.max-length = 40"), ("zebra?", "no embedding for")],
)
def test_a_question_that_cannot_be_asked_is_named(
    nano: NanoBuilt, examples: QuestionExamples, question: str, said: str
) -> None:
    reader = QuestionReader(nano.artifacts, ImageReader(nano.artifacts, 1))
    asked = replace(examples, questions=(question, *examples.questions[1:]))
    if "zebra" in question:
        known = reader.prepare(examples).texts.ids
        reader._vocabulary = reader._vocabulary[np.unique(known)]
    with pytest.raises(DataError, match=said):
        reader.prepare(asked)


WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "peft", "onnx"):
    sys.modules[name] = None  # what makes an import fail
from pathlib import Path
import numpy as np
import fedtune.deploy.edge_vision_site, fedtune.deploy.machine, fedtune.deploy.training
from fedtune.data.questions import QuestionExamples
from fedtune.edge.artifacts import EdgeArtifacts
from fedtune.edge.artifacts import MANIFEST, REFERENCE, EdgeArtifacts
from fedtune.edge.nano import NanoQuestions, open_half
from fedtune.edge.questions import ImageReader, QuestionReader
from fedtune.train.protection import protected

class Remote:  # of a loss that is the sum of all embeddings
    def differentiate(self, embeddings, lengths, labels):
        counts = np.arange(embeddings.shape[1]) < lengths[:, None]
        slope = np.ones_like(embeddings) * counts[..., None]
        return (embeddings * slope).sum((1, 2)), slope

artifacts = EdgeArtifacts(Path(sys.argv[1]))
reader = QuestionReader(artifacts, ImageReader(artifacts, 1))
rows = reader.prepare(
    QuestionExamples(("is it?",), np.zeros(1, int), np.zeros(1, int), (Path(sys.argv[2]),))
)
model = NanoQuestions(open_half(artifacts, 1), Remote(), "server", "")
adapter = np.zeros(artifacts.tensors.size, np.float32)
gradient = artifacts.tensors.split(model.gradient(adapter, rows, np.array([0]))[1])
print(gradient["nano_image.up.bias"].sum(), len(rows.texts.ids))
"""


def test_a_step_runs_where_there_is_no_torch(nano: NanoBuilt) -> None:
    """Each of two image tokens adds scale times `up.bias`, whose gradient is so twice the scale."""
    image = public_captions().files[0]
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(nano.folder), str(image)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    total = float(found.stdout.split()[0])
    connector, _ = load_connector(nano.kit.connector)
    scale = float(connector.length) / connector.width**0.5
    assert total == pytest.approx(2 * scale * connector.width, rel=1e-5)


def test_the_command_that_verifies_passes_and_sees_another_adapters_graph(
    nano: NanoBuilt, tmp_path: Path
) -> None:
    assert all(check.passed for check in verify(nano.artifacts))
    copy = Path(shutil.copytree(nano.folder, tmp_path / "artifacts"))
    content = load_file(copy / REFERENCE)
    content["gradient"] = content["gradient"] * np.float32(1.01)
    (copy / REFERENCE).write_bytes(save(content))
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"][REFERENCE]["sha256"] = sha256_hex((copy / REFERENCE).read_bytes())
    (copy / MANIFEST).write_text(json.dumps(manifest))
    wrong = [check.what for check in verify(EdgeArtifacts(copy)) if not check.passed]
    assert wrong == ["gradient"]


def test_artifacts_of_another_connector_are_refused(nano: NanoBuilt) -> None:
    nano.artifacts.check(nano.config)
    base = nano.config.base.model_copy(update={"connector_digest": "0" * 64})
    with pytest.raises(ArtifactError, match="built from the connector"):
        nano.artifacts.check(nano.config.model_copy(update={"base": base}))
