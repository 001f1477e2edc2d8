"""A LoRA adapter as one vector: views, sizes, seeds, and peft's own loading."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from fedtune.adapter.lora import (
    AttachedAdapter,
    LoRA,
    attach_lora,
    linear_names,
    target_names,
)
from fedtune.base.classifier import EncoderClassifier
from fedtune.errors import ConfigError
from fedtune.export.peft_folder import Passport, read_adapter, write_adapter

Fresh = Callable[..., EncoderClassifier]
HEAD = ("classifier",)


class _Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 4)
        self.classifier = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.tanh(self.body(x)))


def _tiny(seed: int = 0, module_seed: int = 1, **lora: object) -> AttachedAdapter:
    settings = {"rank": 2, "targets": ("body",), "also_train": HEAD, **lora}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(module_seed)
        module = _Tiny()
    return attach_lora(module, LoRA(**settings), seed)  # type: ignore[arg-type]


def _values(adapter: AttachedAdapter) -> dict[str, np.ndarray]:
    """What the module itself computes with, by peft's names."""
    return {
        name: tensor.detach().numpy().copy()
        for name, tensor in get_peft_model_state_dict(adapter.module).items()
    }


def test_number_of_parameters_on_minilm(fresh_classifier: Fresh):
    adapter = attach_lora(fresh_classifier(21), LoRA(rank=8, also_train=HEAD), seed=0)
    # 6 layers × query and value × (A: 8×384, B: 384×8), and a linear layer of 384 to 21.
    assert adapter.manifest.size == 6 * 2 * 2 * 8 * 384 + 384 * 21 + 21
    assert target_names(adapter) == ["query", "value"]
    trainable = sum(p.numel() for p in adapter.module.parameters() if p.requires_grad)
    assert trainable == adapter.manifest.size


def test_the_vector_is_the_module():
    adapter = _tiny()
    vector = np.random.default_rng(0).normal(size=adapter.manifest.size).astype(np.float32)
    adapter.write(vector)
    values = _values(adapter)
    assert list(values) == [tensor.name for tensor in adapter.manifest.tensors]
    for name, part in adapter.manifest.split(vector).items():
        assert np.array_equal(values[name], part)
    assert np.array_equal(adapter.read(), vector)


def test_what_is_read_is_a_copy():
    adapter = _tiny()
    before = adapter.read()
    kept = before.copy()
    adapter.write(before + 1)
    assert np.array_equal(before, kept)
    before[:] = 7
    assert np.array_equal(adapter.read(), kept + 1)


def test_writing_changes_what_the_module_computes_as_lora_says():
    adapter = _tiny(rank=2, alpha=6.0)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    rng = np.random.default_rng(1)
    adapter.write(rng.normal(size=adapter.manifest.size).astype(np.float32))
    values = {name.rpartition("model.")[2]: value for name, value in _values(adapter).items()}
    body = adapter.module.get_submodule("base_model.model.body.base_layer")
    # Hu et al., eq. 3, with the scaling of section 4.1: h = Wx + (α/r) BAx.
    a, b = values["body.lora_A.weight"], values["body.lora_B.weight"]
    weight = body.weight.detach().numpy() + 6.0 / 2 * b @ a
    hidden = np.tanh(x.numpy() @ weight.T + body.bias.detach().numpy())
    expected = hidden @ values["classifier.weight"].T + values["classifier.bias"]
    assert np.abs(adapter.module(x).detach().numpy() - expected).max() < 1e-5


def _check_gradients(adapter: AttachedAdapter) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    adapter.write(np.linspace(-1, 1, adapter.manifest.size, dtype=np.float32))
    adapter.zero_grad()
    loss = adapter.module(x).square().sum()
    parameters = [p for p in adapter.module.parameters() if p.requires_grad]
    separate = torch.autograd.grad(loss, parameters, retain_graph=True)
    loss.backward()
    assert adapter.flat.grad is not None
    views = {p.data_ptr(): g for p, g in zip(parameters, separate, strict=True)}
    start = 0
    for tensor in adapter.manifest.tensors:
        address = adapter.flat.data_ptr() + 4 * start
        flat = adapter.flat.grad[start : start + tensor.size].view(tensor.shape)
        assert torch.allclose(flat, views[address], atol=1e-6)
        assert flat.abs().max() > 0
        start += tensor.size


def test_gradients_appear_in_the_flat_gradient():
    adapter = _tiny()
    _check_gradients(adapter)
    _check_gradients(adapter)  # the second time they must not add up


def test_parameters_are_views_after_a_move():
    adapter = _tiny()
    before = adapter.read()
    adapter.module.double().float()  # every parameter gets storage of its own
    adapter.to(torch.device("cpu"))
    assert np.array_equal(adapter.read(), before)
    _check_gradients(adapter)
    adapter.write(before * 2)
    for name, part in adapter.manifest.split(before).items():
        assert np.array_equal(_values(adapter)[name], part * 2)


def test_write_refuses_another_length():
    adapter = _tiny()
    for wrong in (0, adapter.manifest.size - 1, adapter.manifest.size + 1):
        with pytest.raises(ValueError, match="vector"):
            adapter.write(np.zeros(wrong, np.float32))


def test_the_seed_alone_decides_the_weights():
    first = _tiny(seed=3, module_seed=1)
    torch.manual_seed(99)
    # Another fresh head before attaching: the seed decides the head too.
    again = _tiny(seed=3, module_seed=2)
    other = _tiny(seed=4, module_seed=1)
    assert np.array_equal(first.read(), again.read())
    for (name, mine), theirs in zip(
        first.manifest.split(first.read()).items(),
        other.manifest.split(other.read()).values(),
        strict=True,
    ):
        assert np.array_equal(mine, theirs) == ("lora_B" in name), name  # B starts from zero


def test_an_attached_adapter_starts_as_the_base_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        plain = _Tiny()
    adapter = _tiny(module_seed=1, also_train=())
    x = torch.ones(2, 6)
    assert torch.equal(adapter.module(x), plain(x))


def test_global_random_states_are_untouched():
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    attach_lora(_Tiny(), LoRA(rank=2, targets=("body",), also_train=HEAD), 0)
    # _Tiny() itself draws from the global state; so compare with drawing it alone.
    after = torch.get_rng_state()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    torch.set_rng_state(before[0])
    _Tiny()
    assert torch.equal(torch.get_rng_state(), after)


def test_the_base_is_frozen():
    adapter = _tiny()
    before = {n: p.detach().clone() for n, p in adapter.module.named_parameters()}
    frozen = {n for n, p in adapter.module.named_parameters() if not p.requires_grad}
    adapter.write(adapter.read() + 1)
    for name, parameter in adapter.module.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, before[name])
        else:
            assert torch.equal(parameter, before[name] + 1)
    assert any("body.base_layer.weight" in name for name in frozen)


def test_wrong_targets_are_a_config_error_that_names_the_right_ones():
    with pytest.raises(ConfigError, match="body"):
        _tiny(targets=("no_such_layer",))
    with pytest.raises(ConfigError, match="no_such_head"):
        _tiny(also_train=("no_such_head",))


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_settings_out_of_range(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LoRA(**wrong)


def test_linear_names():
    assert linear_names(_Tiny()) == ["body", "classifier"]


def test_peft_loads_what_is_written(fresh_classifier: Fresh, minilm, tmp_path: Path):
    adapter = attach_lora(fresh_classifier(5), LoRA(rank=4, alpha=12.0, also_train=HEAD), 0)
    rng = np.random.default_rng(2)
    vector = (0.05 * rng.normal(size=adapter.manifest.size)).astype(np.float32)
    adapter.write(vector)
    passport = Passport(
        base="all-MiniLM-L6-v2",
        base_digest=minilm.digest,
        manifest_digest=adapter.manifest.digest,
        config_digest="cc" * 32,
        adapter_digest="dd" * 32,
        labels=("a", "b", "c", "d", "e"),
        pooling="mean",
        max_length=128,
        rounds=1,
        clients=1,
        rule="fedavg",
        method="backprop",
        directions=None,
        seed=0,
        epsilon=None,
        epsilon_unit="",
        fedtune_version="0",
    )
    folder = tmp_path / "adapter"
    write_adapter(folder, adapter.manifest, vector, adapter.peft_config, passport)
    assert np.array_equal(read_adapter(folder, adapter.manifest), vector)
    assert Passport.read(folder) == passport
    batch = minilm.tokenizer(["acute renal failure", "sepsis"], padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    loaded = PeftModel.from_pretrained(fresh_classifier(5), folder).eval()
    with torch.inference_mode():
        difference = adapter.module.eval()(ids, mask) - loaded(ids, mask)
    assert difference.abs().max() < 1e-6
