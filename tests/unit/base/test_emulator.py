"""An emulator from its files, against the decoder whose layers were put in its places by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedtune.base.answering import Answering, apart, first_tokens
from fedtune.base.causal import CausalBase
from fedtune.base.emulator import MANIFEST, WEIGHTS, Emulator, write_emulator
from fedtune.base.layers import LayerPlan
from fedtune.errors import BaseModelError

ANSWERS = ("circle", "yes", "blue", "no")
SHARED = LayerPlan((0, 2, 2, 2, 4, 5), 6, 0.9)
REMOVED = LayerPlan((0, 2, 4, 5), 6, 0.9)


@pytest.fixture(scope="module")
def sliding_decoder(tmp_path_factory: pytest.TempPathFactory, deep_decoder: Path) -> Path:
    """A Qwen2 with biases, an output layer of its own, and layers of two kinds of attention."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("models") / "qwen"
    tokenizer = AutoTokenizer.from_pretrained(deep_decoder)
    tokenizer.save_pretrained(folder)
    kinds = ["full_attention", "sliding_attention"] * 3
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.2,
        use_sliding_window=True,
        sliding_window=2,
        layer_types=kinds,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def by_hand(base: CausalBase, plan: LayerPlan, tokens: np.ndarray) -> Answering:
    """The decoder itself, its weights as they are in half precision, with layers put in places."""
    module: Any = copy.deepcopy(base.module)
    for parameter in module.parameters():
        parameter.data = parameter.data.half().float()
    kinds = getattr(module.config, "layer_types", None)
    module.model.layers = nn.ModuleList(module.model.layers[layer] for layer in plan.standing)
    module.config.num_hidden_layers = len(plan.standing)
    if kinds is not None:
        module.config.layer_types = [kinds[layer] for layer in plan.standing]
    return Answering(*apart(module, "by hand", tokens))


def gradient(decoder: Answering, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    scores = decoder.scores(x, lengths)
    (found,) = torch.autograd.grad(scores.square().sum(), x)
    return scores.detach(), found


@pytest.mark.parametrize("plan", [SHARED, REMOVED], ids=["shared", "removed"])
@pytest.mark.parametrize("kind", ["deep_decoder", "sliding_decoder"])
def test_it_computes_what_the_decoder_does_with_these_layers_in_its_places(
    kind: str, plan: LayerPlan, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base = CausalBase(str(request.getfixturevalue(kind)))
    digest = write_emulator(tmp_path / "emulator", base, ANSWERS, plan)
    tokens = first_tokens(base.tokenizer, ANSWERS)
    emulator = Emulator(tmp_path / "emulator", tokens, digest)
    x, lengths = 0.3 * torch.randn(3, 7, emulator.width), torch.tensor([7, 4, 6])
    found, expected = (
        gradient(decoder, x, lengths) for decoder in (emulator, by_hand(base, plan, tokens))
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    whole = by_hand(base, LayerPlan(tuple(range(6)), 6, 1.0), tokens).scores(x, lengths)
    assert (whole - found[0]).abs().max() > 0.1


@pytest.fixture(scope="module")
def base(deep_decoder: Path) -> CausalBase:
    return CausalBase(str(deep_decoder))


def emulate(base: CausalBase, folder: Path, plan: LayerPlan = SHARED) -> Emulator:
    digest = write_emulator(folder, base, ANSWERS, plan)
    return Emulator(folder, first_tokens(base.tokenizer, ANSWERS), digest)


def test_a_shared_layer_is_one_set_of_weights_in_memory_and_on_disk(
    base: CausalBase, tmp_path: Path
) -> None:
    shared = emulate(base, tmp_path / "shared")
    removed = emulate(base, tmp_path / "removed", REMOVED)
    assert (tmp_path / "shared" / WEIGHTS).read_bytes() == (
        tmp_path / "removed" / WEIGHTS
    ).read_bytes()
    decoder: Any = shared._decoder
    assert [layer is decoder.layers[1] for layer in decoder.layers] == [
        *(False, True, True, True),
        *(False, False),
    ]
    layer = sum(p.numel() for p in base.module.get_submodule("model.layers.0").parameters())
    assert shared.parameters == removed.parameters == 4 * layer + 64 + len(ANSWERS) * 64
    on_disk = sum(t.numel() for t in load_file(tmp_path / "shared" / WEIGHTS).values())
    assert on_disk == shared.parameters
    assert shared.size == sum(file.stat().st_size for file in (tmp_path / "shared").iterdir())


def test_removed_layers_and_other_words_are_not_in_its_files(
    base: CausalBase, tmp_path: Path
) -> None:
    emulate(base, tmp_path / "emulator")
    there = {
        row.numpy().tobytes()
        for tensor in load_file(tmp_path / "emulator" / WEIGHTS).values()
        for row in tensor.reshape(-1, tensor.shape[-1])
    }

    def share(tensor: Tensor) -> float:
        rows = [row.numpy().tobytes() in there for row in tensor.detach().half()]
        return sum(rows) / len(rows)

    for name, tensor in base.module.named_parameters():
        if "layers." in name and tensor.ndim == 2:
            kept = int(name.split(".")[2]) in SHARED.kept
            assert share(tensor) == float(kept), name
    table = base.module.get_input_embeddings().weight
    assert share(table) == pytest.approx(len(ANSWERS) / len(table))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("weights", "are not those that emulator.json names"),
        ("manifest", "its digest is"),
        ("answers", "made for other answers"),
        ("gone", "not an emulator of a base model"),
        ("large", "too large"),
        ("layers", "layers, not"),
    ],
)
def test_what_is_not_the_agreed_emulator_is_refused(
    base: CausalBase, tmp_path: Path, change: str, said: str
) -> None:
    folder = tmp_path / "emulator"
    made = emulate(base, folder)
    tokens, digest = first_tokens(base.tokenizer, ANSWERS), made.digest
    manifest = folder / MANIFEST
    if change == "weights":
        with (folder / WEIGHTS).open("ab") as file:
            file.write(b"?")
    elif change == "manifest":
        manifest.write_text(manifest.read_text() + " ")
    elif change == "answers":
        tokens = first_tokens(base.tokenizer, ANSWERS[::-1])
    elif change == "gone":
        manifest.unlink()
    elif change == "large":
        manifest.write_text(manifest.read_text() + " " * (1 << 20))
    else:  # a plan that needs other layers than there are
        content = json.loads(manifest.read_text())
        content["plan"]["standing"] = [0, 2, 2, 2, 2, 5]
        manifest.write_text(json.dumps(content))
    with pytest.raises(BaseModelError, match=said):
        Emulator(folder, tokens, None if change == "layers" else digest)
