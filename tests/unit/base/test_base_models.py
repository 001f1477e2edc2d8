"""Base model folders: what is refused, what the digest covers, what is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fedtune.base.classifier import BaseModel, EncoderClassifier, load_classifier
from fedtune.base.resolve import digest_base, resolve_base
from fedtune.errors import BaseModelError

Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def tiny_folder(minilm: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 8 hidden values with MiniLM's tokenizer."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-bert")
    config = BertConfig(
        vocab_size=30522,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=40,
    )
    BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(minilm.folder / name, folder / name)
    return folder


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy to change."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def _flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def _edit_config(**changes: object) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def _only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, folder / "pytorch_model.bin")


def _clip(folder: Path) -> None:
    """An architecture of text and images, which has no hidden_size of its own."""
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "clip", "text_config": small, "vision_config": small}
    (folder / "config.json").write_text(json.dumps(config))


def _cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "config.json"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{"), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{}"), "model_type"),
        (_only_pickled, "pickled"),
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
    ],
    ids=["missing", "no-config", "cut-json", "list", "not-utf8", "no-type", "pickle", "no-weights"],
)
def test_resolve_refuses(folder: Path, edit: Edit, word: str):
    edit(folder)
    with pytest.raises(BaseModelError, match=word):
        resolve_base(str(folder))


@pytest.mark.parametrize(
    "edit",
    [
        _edit_config(model_type="no-such-architecture"),
        _clip,
        _edit_config(hidden_size=16),
        pytest.param(
            _cut_weights,
        ),
        pytest.param(
            _edit_config(num_hidden_layers=2),
        ),
        lambda folder: (folder / "tokenizer.json").write_text("{"),
    ],
    ids=[
        "unknown-type",
        "no-text-encoder",
        "other-size",
        "cut-weights",
        "layers-missing",
        "cut-tokenizer",
    ],
)
def test_load_refuses(folder: Path, edit: Edit):
    edit(folder)
    with pytest.raises(BaseModelError, match=folder.name):
        BaseModel(str(folder))


def test_a_pickle_is_never_opened(folder: Path):
    # Beside safetensors a pickle is ignored, and loading it would leave a file behind.
    target = folder / "opened"
    code = f"cos\nsystem\n(S'touch {target}'\ntR."
    (folder / "pytorch_model.bin").write_text(code)
    assert BaseModel(str(folder)).parameters > 0
    assert not target.exists()


def test_the_digest_is_of_what_decides_the_computation(folder: Path):
    original = digest_base(folder)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "vocab.txt"):
        _flip(folder / name)
        assert digest_base(folder) != original, name
        _flip(folder / name)
        assert digest_base(folder) == original
    _flip(folder / "model.safetensors", 5000)
    assert digest_base(folder) != original


def test_the_digest_is_not_of_what_lies_beside(folder: Path):
    original = digest_base(folder)
    (folder / "README.md").write_text("hello")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert digest_base(folder) == original
    other = folder.with_name("elsewhere")
    folder.rename(other)
    assert digest_base(other) == original


def test_the_digest_tells_contents_that_change_places(folder: Path):
    original = digest_base(folder)
    a, b = folder / "vocab.txt", folder / "tokenizer_config.json"
    a_data, b_data = a.read_bytes(), b.read_bytes()
    a.write_bytes(b_data)
    b.write_bytes(a_data)
    assert digest_base(folder) != original
    a.write_bytes(a_data)
    b.write_bytes(b_data)
    assert digest_base(folder) == original
    # The same contents in the same order under another name.
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert digest_base(folder) != original


@pytest.mark.parametrize("name", ["merges.txt", "vocab.json", "sentencepiece.bpe.model"])
def test_the_digest_covers_every_kind_of_vocabulary(folder: Path, name: str):
    (folder / name).write_text("one")
    original = digest_base(folder)
    (folder / name).write_text("two")
    assert digest_base(folder) != original


def test_the_packaged_name_is_the_packaged_folder(minilm: BaseModel):
    assert minilm.folder == resolve_base(str(minilm.folder))
    assert minilm.digest == digest_base(minilm.folder)
    # all-MiniLM-L6-v2 as published, without the pooling layer (384 × 384 + 384).
    assert minilm.parameters == 22_713_216 - (384 * 384 + 384)
    assert minilm.max_tokens == 512
    assert not any(p.requires_grad for p in minilm.encoder.parameters())


def test_a_folder_is_loaded_and_computes(folder: Path):
    base = BaseModel(str(folder))
    assert base.max_tokens == 40
    ids = torch.tensor([[101, 2054, 102, 0], [101, 7, 8, 102]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    for pooling in ("mean", "cls"):
        module: EncoderClassifier = base.classifier(3, pooling).eval()  # type: ignore[arg-type]
        torch.nn.init.normal_(module.classifier.weight)
        with torch.inference_mode():
            states = base.encoder.eval()(input_ids=ids, attention_mask=mask)[0]
            means = [states[0, :3].mean(0), states[1].mean(0)]
            pooled = states[:, 0] if pooling == "cls" else torch.stack(means)
            expected = pooled @ module.classifier.weight.T + module.classifier.bias
            assert (module(ids, mask) - expected).abs().max() < 1e-5


def test_load_classifier_is_ready_for_an_adapter_of_any_run(folder: Path):
    module = load_classifier(str(folder), 7)
    assert module.classifier.weight.shape == (7, 8)


def test_another_model_than_the_agreed_one_is_not_loaded(folder: Path) -> None:
    digest = digest_base(folder)
    assert BaseModel(str(folder), digest).digest == digest
    with pytest.raises(BaseModelError, match=f"its digest is {digest}, base.digest says abab"):
        BaseModel(str(folder), "ab" * 32)
