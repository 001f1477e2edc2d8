"""States of a decoder against those that transformers itself hands out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedtune.base.answering import AnsweringDecoder
from fedtune.base.causal import CausalBase
from fedtune.base.kit import ClientKit, write_kit
from fedtune.errors import BaseModelError

ANSWERS = ("circle", "yes", "blue")
LENGTHS = torch.tensor([4, 2, 3])


@pytest.fixture(scope="module")
def base(answering_decoder: Path) -> CausalBase:
    return CausalBase(str(answering_decoder))


@pytest.fixture(scope="module")
def embeddings(base: CausalBase) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, base.config.hidden_size, generator=generator) * 0.2


@pytest.fixture(scope="module")
def deep(base: CausalBase) -> CausalBase:
    """One of five layers."""
    import copy

    from transformers import LlamaForCausalLM

    config = copy.deepcopy(base.config)
    config.num_hidden_layers = 5
    found = copy.copy(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        found.module = LlamaForCausalLM(config).eval().requires_grad_(False)
    return found


@pytest.mark.parametrize(
    ("rungs", "layers"), [(1, [5]), (2, [2, 5]), (3, [1, 3, 5]), (5, [1, 2, 3, 4, 5])]
)
def test_states_after_evenly_spread_layers(
    deep: CausalBase, embeddings: Tensor, rungs: int, layers: list[int]
) -> None:
    mask = (torch.arange(4) < LENGTHS[:, None]).long()
    hooks = [len(module._forward_hooks) for module in deep.module.modules()]
    with torch.no_grad():
        found = AnsweringDecoder(deep, ANSWERS, rungs).outputs(embeddings, LENGTHS)
        # Nothing is left behind in the decoder.
        assert [len(module._forward_hooks) for module in deep.module.modules()] == hooks
        states = deep.module.model(
            inputs_embeds=embeddings, attention_mask=mask, output_hidden_states=True
        ).hidden_states
    expected = [states[layer][torch.arange(3), LENGTHS - 1] for layer in layers]
    torch.testing.assert_close(found, torch.cat(expected, 1))


def test_the_head_makes_the_scores_of_the_last_state(base: CausalBase, embeddings: Tensor) -> None:
    decoder = AnsweringDecoder(base, ANSWERS, 2)
    with torch.no_grad():
        state = decoder.outputs(embeddings, LENGTHS)[:, -decoder.width :]
        scores = AnsweringDecoder(base, ANSWERS).outputs(embeddings, LENGTHS)
        table: nn.Embedding = base.module.get_input_embeddings()
        text = base.module.model(input_ids=torch.from_numpy(decoder.tokens)[None])
    torch.testing.assert_close(state @ decoder.head.weight.T, scores)
    torch.testing.assert_close(decoder.head.weight, table.weight[decoder.tokens])  # they are tied
    last = text.last_hidden_state[0, -1]
    assert decoder.head.scale == pytest.approx(float(last.norm()) / len(last) ** 0.5, rel=1e-5)


def test_more_rungs_than_layers_are_refused(base: CausalBase) -> None:
    with pytest.raises(BaseModelError, match=r"2 layers known, adapter\.rungs = 3"):
        AnsweringDecoder(base, ANSWERS, 3)


def test_a_kit_has_the_head_where_it_is_needed(base: CausalBase, tmp_path: Path) -> None:
    connector = tmp_path / "made-elsewhere"
    connector.write_bytes(b"a connector")
    head = AnsweringDecoder(base, ANSWERS, 1).head
    write_kit(tmp_path / "kit", base, connector, [" yes"], head=head)
    found = ClientKit(tmp_path / "kit").head(len(ANSWERS))
    assert torch.equal(found.weight, head.weight)
    assert found.scale == head.scale
    with pytest.raises(BaseModelError, match=r"rows for 3 answers, data\.labels has 4"):
        ClientKit(tmp_path / "kit").head(4)
    without = write_kit(tmp_path / "without", base, connector, [" yes"])
    assert "head.safetensors" not in without.manifest.files
    with pytest.raises(BaseModelError, match="rows of the output layer"):
        without.head(3)
