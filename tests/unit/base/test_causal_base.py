"""Causal language models as base models: what is loaded, and what is refused."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedtune.base.causal import CausalBase, causal_outline, position_logits
from fedtune.base.classifier import BaseModel
from fedtune.base.resolve import digest_base, is_base_file, list_base, resolve_base
from fedtune.errors import BaseModelError

SMOLLM2 = "SmolLM2-135M-Instruct"


@pytest.fixture
def folder(tiny_decoder: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(tiny_decoder, tmp_path / "copy"))


def test_logits_are_those_of_the_folder_with_one_row_per_position(tiny_decoder: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = CausalBase(str(tiny_decoder))
    ids = torch.tensor([[5, 9, 11, 0], [7, 8, 4, 30]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    plain = AutoModelForCausalLM.from_pretrained(tiny_decoder)
    with torch.no_grad():
        found = position_logits(base.module, ids, mask)
        expected = plain(input_ids=ids, attention_mask=mask).logits
    assert found.shape == (8, base.config.vocab_size)
    torch.testing.assert_close(found, expected.reshape(8, -1))
    assert base.parameters == sum(p.numel() for p in plain.parameters())
    assert not any(p.requires_grad for p in base.module.parameters())
    assert base.max_tokens == 128
    assert base.tokenizer.decode([base.end_id]) == "<|end|>"


def test_an_outline_has_the_shapes_and_no_memory(tiny_decoder: Path) -> None:
    outline = causal_outline(tiny_decoder)
    shapes = {name: p.shape for name, p in CausalBase(str(tiny_decoder)).module.named_parameters()}
    assert {name: p.shape for name, p in outline.named_parameters()} == shapes
    assert all(p.is_meta for p in outline.parameters())


def _masked_model(folder: Path) -> None:
    """A BERT with its own output layer, which reads a text from both sides."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=400, intermediate_size=16, initializer_range=1.0, **sizes)
    (folder / "model.safetensors").unlink()
    BertForMaskedLM(config).save_pretrained(folder)


def _without_end(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, folder / "pytorch_model.bin")


def _fewer_layers(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 3}))


def _two_gguf_files(folder: Path) -> None:
    (folder / "config.json").unlink()
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(b"GGUF")


def _broken_gguf(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "a.gguf").write_bytes(b"GGUF" + b"\xff" * 60)


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (_masked_model, "not a causal language model"),
        (_without_end, "no token for the end of a text"),
        (_without_weights, "no *.safetensors"),
        (_pickled, "never loaded"),
        (_fewer_layers, "weights are missing"),
        (_two_gguf_files, "2 GGUF files"),
        (_broken_gguf, "cannot be loaded"),
    ],
)
def test_what_cannot_be_used_is_refused(
    folder: Path, edit: Callable[[Path], None], word: str
) -> None:
    edit(folder)
    with pytest.raises(BaseModelError) as caught:
        CausalBase(str(folder))
    assert word in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_digest_is_over_a_gguf_file_too(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF one")
    first = digest_base(tmp_path)
    assert [found.name for found in list_base(tmp_path)] == ["model.gguf"]
    file.write_bytes(b"GGUF two")
    assert digest_base(tmp_path) != first
    assert is_base_file("model.gguf")
    assert not is_base_file("../model.gguf")
    assert not is_base_file("model.gguf.bin")


def test_a_gguf_file_is_no_classifier(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(BaseModelError, match="causal-lm"):
        BaseModel(str(tmp_path))


def test_smollm2_knows_what_it_learned() -> None:
    """The one test on real weights: a packaged GGUF file, unpacked to float32."""
    base = CausalBase(SMOLLM2, digest_base(resolve_base(SMOLLM2)))
    assert base.parameters == 134_515_008  # as its model card counts them: 135M
    ids = base.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = position_logits(base.module, ids, torch.ones_like(ids))
    assert base.tokenizer.decode(logits[-1].argmax()) == " Paris"
    with tempfile.TemporaryDirectory() as copy:  # as an ordinary model: half a gigabyte
        base.module.save_pretrained(copy)
        stored = load_file(Path(copy) / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    # The output layer is the table of embeddings, and stored once.
    assert sum(tensor.numel() for tensor in stored.values()) == base.parameters
