"""NanoAdapters against their formula, and the client's half against plain concatenation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import erf
from torch import nn

from fedtune.adapter.nano import ClientHalf, Nano, NanoAdapter, Prompt, attach_nano
from fedtune.base.connector import Connector
from fedtune.errors import ConfigError

WIDTH, RANK, FEATURES, TOKENS = 16, 5, 12, 2


def make_half(seed: int = 0) -> ClientHalf:
    torch.manual_seed(seed)
    connector = Connector(FEATURES, WIDTH, TOKENS)
    connector.length.fill_(2.0)
    found = attach_nano(connector, nn.Embedding(30, WIDTH), Nano(RANK), seed).module
    assert isinstance(found, ClientHalf)
    return found


def make_prompt(pictured: list[bool], lengths: list[int]) -> Prompt:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 30, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    features = torch.randn(len(lengths), FEATURES, generator=generator)
    return Prompt(features, torch.tensor(pictured), ids * mask, mask)


def test_the_first_round_is_the_base_model_bit_for_bit() -> None:
    x = torch.randn(3, 7, WIDTH)
    assert torch.equal(NanoAdapter(WIDTH, RANK, 0.3)(x), x)


def test_it_computes_its_formula() -> None:
    torch.manual_seed(3)
    adapter = NanoAdapter(WIDTH, RANK, 0.25)
    nn.init.normal_(adapter.up.weight)
    nn.init.normal_(adapter.up.bias)
    x = torch.randn(4, WIDTH)
    down, up = (
        (layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy())
        for layer in (adapter.down, adapter.up)
    )
    hidden = x.double().numpy() / 0.25 @ down[0].T + down[1]
    hidden = hidden * (1 + erf(hidden / math.sqrt(2))) / 2
    expected = x.double().numpy() + 0.25 * (hidden @ up[0].T + up[1])
    np.testing.assert_allclose(adapter(x).detach().numpy(), expected, atol=1e-5)


def test_what_travels_is_the_two_adapters_and_no_more() -> None:
    half = make_half()
    attached = attach_nano(half.connector, half.embeddings, Nano(RANK), seed=0)
    assert attached.manifest.size == 2 * (2 * WIDTH * RANK + RANK + WIDTH)
    assert {t.name.split(".")[0] for t in attached.manifest.tensors} == {"nano_image", "nano_text"}
    trainable = sum(p.numel() for p in attached.module.parameters() if p.requires_grad)
    assert trainable == attached.manifest.size


def test_the_seed_alone_decides_how_it_begins() -> None:
    half = make_half()
    one, same, other = (
        attach_nano(half.connector, half.embeddings, Nano(RANK), seed).read() for seed in (4, 4, 5)
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_a_question_stands_behind_its_image_or_alone() -> None:
    half = make_half()
    with torch.no_grad():
        half.nano_text.up.weight.normal_()
        half.nano_image.up.weight.normal_()
    prompt = make_prompt([True, False, True], [4, 3, 1])
    with torch.inference_mode():
        found, lengths = half(prompt)
        image = half.nano_image(half.connector(prompt.features))
        text = half.nano_text(half.embeddings(prompt.ids))
    assert lengths.tolist() == [6, 3, 3]
    for row, (pictured, count) in enumerate([(True, 4), (False, 3), (True, 1)]):
        parts = [image[row]] * pictured + [text[row, :count]]
        torch.testing.assert_close(found[row, : lengths[row]], torch.cat(parts))


def test_without_an_image_its_adapter_gets_no_gradient() -> None:
    half = make_half()
    prompt = make_prompt([False, False], [4, 2])
    embeddings, lengths = half(prompt)
    counted = torch.arange(embeddings.shape[1]) < lengths[:, None]
    (embeddings[counted] ** 2).sum().backward()
    assert float(half.nano_image.up.weight.grad.abs().max()) == 0.0
    assert float(half.nano_text.up.weight.grad.abs().max()) > 0.0


def test_a_connector_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="tokens of 16 values, this base model takes 24"):
        attach_nano(Connector(FEATURES, WIDTH, TOKENS), nn.Embedding(30, 24), Nano(RANK), 0)


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        Nano(0)
