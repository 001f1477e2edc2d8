"""Which layers of a decoder can stand for others, by how alike their representations are.

CRaSh (arXiv 2310.15477) clusters neighbouring layers, removes all but one of each cluster, and
shares the one that stays at the places of the removed ones. No training is needed for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedtune.base.causal import CausalBase
from fedtune.errors import BaseModelError, ConfigError

Float64Array = NDArray[np.float64]
FEWEST = 3  # the first layer, the last one, and one for all between them
_MOST_TOKENS = 1024  # what is kept of a layer is the square of it


@dataclass(frozen=True)
class LayerPlan:
    """Which layer of the decoder stands at each place of its emulator.

    As many places as the decoder has layers if layers are shared, else as many as are kept.
    """

    standing: tuple[int, ...]
    layers: int  # of the whole decoder
    similarity: float
    """Mean CKA of each layer's states with those of the layer that is kept for it."""

    @property
    def kept(self) -> tuple[int, ...]:
        """The layers that the emulator has, ascending."""
        return tuple(sorted(set(self.standing)))

    @property
    def shared(self) -> bool:
        """Whether kept layers stand at the places of removed ones."""
        return len(self.standing) > len(self.kept)


def plan_layers(similarity: Float64Array, keep: int, share: bool) -> LayerPlan:
    """Choose `keep` layers by the `[layers, layers]` similarity of their states; deterministic.

    The first layer and the last stay, as Offsite-Tuning (arXiv 2302.04870) has it. Raises
    `ConfigError` if `keep` is not less than there are layers.
    """
    layers = len(similarity)
    check_fewer(keep, layers)
    clusters = [[0], *cluster(similarity[1:-1, 1:-1], keep - 2, start=1), [layers - 1]]
    found = {layer: center(similarity, members) for members in clusters for layer in members}
    standing = tuple(found[layer] for layer in range(layers))
    mean = float(np.mean([similarity[layer, kept] for layer, kept in found.items()]))
    return LayerPlan(standing if share else tuple(sorted(set(standing))), layers, mean)


def check_fewer(keep: int, layers: int) -> None:
    """Raise `ConfigError` if a decoder of so many layers has no emulator of `keep` layers."""
    if not FEWEST <= keep < layers:
        raise ConfigError(
            f"emulator.layers = {keep}, but the base model has {layers} layers; an emulator has "
            f"fewer, and at least {FEWEST}"
        )


def layer_states(base: CausalBase, texts: Sequence[str]) -> list[Float64Array]:
    """What each layer says of the same tokens of `texts`: a float64 `[tokens, width]` for each.

    A text's first token is left out: decoders park attention on it, with states a hundred times as
    long as others (Xiao et al., arXiv 2309.17453), and it would be all that a similarity sees.
    """
    found: list[list[Float64Array]] = []
    tokens = 0
    with torch.inference_mode():
        for text in dict.fromkeys(texts):  # each text once, in order
            ids = torch.tensor([base.tokenizer(text)["input_ids"][: base.max_tokens]])
            if ids.shape[1] < 2 or tokens + ids.shape[1] - 1 > _MOST_TOKENS:
                continue
            module: Any = base.module
            states = module(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
            # The first are the embeddings; the last ones are behind the final norm, which changes
            # nothing: the last layer stays whatever it is like.
            found.append([state[0, 1:].double().numpy() for state in states[1:]])
            tokens += ids.shape[1] - 1
    if tokens < 2:
        raise BaseModelError("an emulator is made by its states on public texts; there are none")
    return [np.concatenate(rows) for rows in zip(*found, strict=True)]


def similarities(states: Sequence[Float64Array]) -> Float64Array:
    """Linear centered kernel alignment of all pairs of representations, `[layers, layers]`.

    Of two representations X and Y `[tokens, width]`, columns centered, with the kernels K = XXᵀ and
    L = YYᵀ: ⟨K, L⟩ / (|K| |L|), Frobenius (Kornblith et al. 2019, arXiv 1905.00414, section 3).
    1 for what differs by a rotation and a scale; 0 for one that says the same of all tokens.
    """
    kernels = np.empty((len(states), len(states[0]) ** 2), np.float32)
    for place, state in enumerate(states):
        centered = state - state.mean(0)
        kernel = centered @ centered.T
        norm = np.linalg.norm(kernel)
        kernels[place] = (kernel / norm if norm else kernel).reshape(-1)
    found = (kernels @ kernels.T).astype(np.float64)
    # Rounded, so that what is alike is equal: the choice must not hang on a last digit.
    return np.round((found + found.T) / 2, 5)


def cluster(similarity: Float64Array, count: int, start: int = 0) -> list[list[int]]:
    """Divide neighbouring layers into `count` clusters, merging step by step what is most alike.

    Of two clusters the mean `[layers, layers]` similarity of their pairs counts; of equals the
    earlier ones merge. Layers are numbered from `start`.
    """
    found = [[layer] for layer in range(len(similarity))]
    while len(found) > count:
        alike = [similarity[np.ix_(one, other)].mean() for one, other in pairwise(found)]
        place = int(np.argmax(alike))
        found[place : place + 2] = [found[place] + found[place + 1]]
    return [[start + layer for layer in layers] for layers in found]


def center(similarity: Float64Array, layers: Sequence[int]) -> int:
    """The layer that is most like all others of its cluster; the first one of equals."""
    means = similarity[np.ix_(layers, layers)].mean(0)
    return layers[int(np.argmax(means))]
