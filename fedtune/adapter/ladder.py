"""A ladder (LST, Sung et al. 2022, arXiv 2206.06522, section 3): a small network beside a big one.

It is fed with the states of a frozen language model at some of its layers and changes nothing in
it, so no gradient goes through the language model, and its states for an example stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedtune.adapter.lora import AttachedAdapter
from fedtune.adapter.nano import ClientHalf, attach_half, check_widths
from fedtune.base.answering import Head
from fedtune.base.connector import Connector
from fedtune.base.kit import Table

TEMPERATURE = 0.1  # section 3.2
_WIDER = 4  # a block's hidden layer, as in the language model


class SideBlock(nn.Module):
    """h + MLP(norm(h)): a transformer's block for one position.

    The paper's blocks attend to other positions too. The answer's position alone is looked at
    here, where attention would be a linear map: those of all tokens would have to cross the cut.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, _WIDER * width)
        self.out = nn.Linear(_WIDER * width, width)

    def forward(self, h: Tensor) -> Tensor:
        """float32 `[n, width]` → the same shape."""
        found: Tensor = h + self.out(functional.gelu(self.hidden(self.norm(h))))
        return found


class LadderReadout(nn.Module):
    """States of all rungs → scores: the base model's, and what the ladder adds to its last state.

    h_i = block_i(μ_i · down_i(x_i) + (1 - μ_i) · h_{i-1}) with μ_i = sigmoid(α_i / T), as in
    section 3.2. The first rung mixes nothing: below it is the embedding, at the answer's position
    always that of the same word. The scores are those of x_k + s · up(norm(h_k)) by the frozen
    rows of the output layer, with `up` zero at first: round 0 is the base model. States differ in
    size from layer to layer, so each x_i goes down with a root mean square of 1.
    """

    weight: Tensor

    def __init__(self, head: Head, rungs: int, rank: int) -> None:
        """`rank` is the width of the side network, the paper's d / r."""
        super().__init__()
        width = head.weight.shape[1]
        self.rungs, self.scale = rungs, head.scale
        self.down = nn.ModuleList(nn.Linear(width, rank) for _ in range(rungs))
        self.blocks = nn.ModuleList(SideBlock(rank) for _ in range(rungs))
        self.gates = nn.Parameter(torch.zeros(rungs - 1))  # α of all rungs but the first
        self.norm = nn.LayerNorm(rank)
        self.up = nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.register_buffer("weight", head.weight)

    def forward(self, states: Tensor) -> Tensor:
        """float32 `[n, rungs · width]`, the lowest rung first → scores, float32 `[n, answers]`."""
        x = states.view(len(states), self.rungs, -1)
        normed = functional.rms_norm(x, x.shape[-1:])
        h = self.blocks[0](self.down[0](normed[:, 0]))
        for rung in range(1, self.rungs):
            mix = torch.sigmoid(self.gates[rung - 1] / TEMPERATURE)
            h = self.blocks[rung](mix * self.down[rung](normed[:, rung]) + (1 - mix) * h)
        scores: Tensor = (x[:, -1] + self.scale * self.up(self.norm(h))) @ self.weight.T
        return scores


def attach_ladder(
    connector: Connector,
    embeddings: nn.Embedding | Table,
    head: Head,
    rungs: int,
    rank: int,
    seed: int,
) -> AttachedAdapter:
    """The client's half without NanoAdapters, and a ladder that is drawn from `seed`.

    Raises `ConfigError` if connector and table are of two widths.
    """
    check_widths(connector, embeddings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ladder = LadderReadout(head, rungs, rank)
    return attach_half(ClientHalf(connector, embeddings, nn.Identity(), nn.Identity(), ladder))
