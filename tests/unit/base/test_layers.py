"""Which layers stand for which: similarities, clusters and plans against values from elsewhere."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedtune.base.causal import CausalBase
from fedtune.base.layers import center, cluster, layer_states, plan_layers, similarities
from fedtune.errors import BaseModelError, ConfigError

RNG = np.random.default_rng(4)


def cka_of_features(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The same number from cross-covariances instead of kernels (Kornblith et al., eq. for linear
    kernels)."""
    x, y = x - x.mean(0), y - y.mean(0)
    norms = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(x.T @ y) ** 2 / norms)


def test_similarities_are_linear_cka() -> None:
    x = RNG.normal(size=(40, 7)) + 3.0
    near, far = x + 0.5 * RNG.normal(size=x.shape), RNG.normal(size=(40, 5))
    rotation = np.linalg.qr(RNG.normal(size=(7, 7)))[0]
    found = similarities([x, near, far, 2.5 * x @ rotation + 1.0, np.ones((40, 3))])
    assert found[0, 1] == pytest.approx(cka_of_features(x, near), abs=1e-5)
    assert found[1, 2] == pytest.approx(cka_of_features(near, far), abs=1e-5)
    assert 0.3 < found[0, 1] < 0.99
    assert found[0, 3] == pytest.approx(1.0, abs=1e-5)  # a rotation, a scale and a shift
    assert found[4, :4].tolist() == [0.0] * 4  # the same of all tokens
    np.testing.assert_array_equal(found, found.T)


def blocks(*sizes: int, within: float = 0.9, between: float = 0.2) -> NDArray[np.float64]:
    """Layers in groups of these sizes that are alike."""
    groups = np.repeat(range(len(sizes)), sizes)
    found = np.where(groups[:, None] == groups, within, between)
    np.fill_diagonal(found, 1.0)
    return found


def test_neighbours_that_are_alike_are_merged() -> None:
    assert cluster(blocks(2, 4, 1, 3), 4) == [[0, 1], [2, 3, 4, 5], [6], [7, 8, 9]]
    # By the mean of all pairs: at the border 1 and 2 are the most alike of what is left.
    chain = np.array(
        [
            [1.0, 0.9, 0.0, 0.0],
            [0.9, 1.0, 0.8, 0.0],
            [0.0, 0.8, 1.0, 0.5],
            [0.0, 0.0, 0.5, 1.0],
        ]
    )
    assert cluster(chain, 2) == [[0, 1], [2, 3]]
    assert cluster(chain, 1, start=5) == [[5, 6, 7, 8]]


def test_the_center_is_most_like_the_others_and_of_equals_the_first() -> None:
    similarity = np.array([[1.0, 0.7, 0.2], [0.7, 1.0, 0.7], [0.2, 0.7, 1.0]])
    assert center(similarity, [0, 1, 2]) == 1
    assert center(similarity, [1, 2]) == 1


@pytest.mark.parametrize("keep", range(3, 12))
def test_a_plan_keeps_both_ends_and_lets_a_kept_layer_stand_for_its_neighbours(keep: int) -> None:
    states = np.cumsum(RNG.normal(size=(12, 60, 9)), 0)
    similarity = similarities(list(states))
    shared, alone = (plan_layers(similarity, keep, share) for share in (True, False))
    assert alone.standing == shared.kept == alone.kept
    assert len(alone.standing) == keep
    assert (shared.shared, alone.shared) == (True, False)
    standing = shared.standing
    assert len(standing) == shared.layers == 12
    assert (standing[0], standing[-1]) == (0, 11)
    assert standing.count(0) == standing.count(11) == 1
    assert all(one <= other for one, other in pairwise(standing))
    assert all(standing[layer] == layer for layer in shared.kept)
    expected = np.mean([similarity[layer, kept] for layer, kept in enumerate(standing)])
    assert shared.similarity == alone.similarity == pytest.approx(expected)


@pytest.mark.parametrize("keep", [2, 12, 13])
def test_an_emulator_has_fewer_layers_and_at_least_three(keep: int) -> None:
    with pytest.raises(ConfigError, match=rf"emulator\.layers = {keep}.*12 layers"):
        plan_layers(np.ones((12, 12)), keep, True)


def test_states_are_what_layers_say_of_all_tokens_but_the_first(deep_decoder: Path) -> None:
    base = CausalBase(str(deep_decoder))
    texts = ["what is blue?", "is it a circle?", "what is blue?"]
    said: list[list[torch.Tensor]] = [[] for _ in range(6)]
    module: Any = base.module
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out, rows=rows: rows.append(out[0, 1:]))
        for layer, rows in zip(module.model.layers, said, strict=True)
    ]
    with torch.no_grad():
        for text in texts[:2]:  # each text counts once
            module(**base.tokenizer(text, return_tensors="pt"))
    for hook in hooks:
        hook.remove()
    found = layer_states(base, texts)
    assert len(found) == 6
    for state, rows in zip(found[:-1], said[:-1], strict=True):
        np.testing.assert_allclose(state, torch.cat(rows), rtol=1e-5, atol=1e-6)
    assert len(found[0]) == sum(len(base.tokenizer(t)["input_ids"]) - 1 for t in texts[:2])
    with pytest.raises(BaseModelError, match="there are none"):
        layer_states(base, [])
