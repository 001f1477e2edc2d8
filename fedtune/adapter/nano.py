"""NanoAdapters (FedNano, arXiv 2506.14824, section 3): bottlenecks on a language model's inputs.

NanoAdapter-I stands behind the connector, on the image's tokens; NanoAdapter-T behind the table of
embeddings, on the question's. The language model itself is not needed to hold or to move them: a
client has this half, and sends what comes out of it to where the language model is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedtune.adapter.lora import AttachedAdapter
from fedtune.base.connector import Connector
from fedtune.base.kit import Table
from fedtune.errors import ConfigError

IMAGE, TEXT = "nano_image", "nano_text"


@dataclass(frozen=True)
class Nano:
    """Settings of a pair of NanoAdapters."""

    rank: int = 32

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"NanoAdapter rank must be at least 1, got {self.rank}")


class NanoAdapter(nn.Module):
    """x + s · up(GELU(down(x / s))), with `up` zero at first: round 0 is the base model.

    `scale` s is the root mean square of an embedding's values, so that the bottleneck sees values
    around 1, whatever the language model: what it learns does not depend on a model's units.
    """

    def __init__(self, width: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """float32 `[..., width]` → the same shape."""
        adapted: Tensor = x + self.scale * self.up(functional.gelu(self.down(x / self.scale)))
        return adapted


class Prompt(NamedTuple):
    """A batch of questions: what the client's half takes.

    `features` are float32 `[n, features]`, and count where `pictured` (bool `[n]`); `ids` and
    `mask` are int64 `[n, longest]`, filled up on the right.
    """

    features: Tensor
    pictured: Tensor
    ids: Tensor
    mask: Tensor


class ClientHalf(nn.Module):
    """All of the model that is in front of the language model: connector, table, NanoAdapters."""

    def __init__(self, connector: Connector, embeddings: nn.Embedding | Table, nano: Nano) -> None:
        """Raises `ConfigError` if connector and table are of two widths."""
        super().__init__()
        width = embeddings.embedding_dim
        if connector.width != width:
            raise ConfigError(
                f"the connector makes tokens of {connector.width} values, this base model takes "
                f"{width}; pretrain one for it: fedtune nano pretrain-connector"
            )
        self.connector, self.embeddings = connector, embeddings
        scale = float(connector.length) / width**0.5
        self.nano_image, self.nano_text = (NanoAdapter(width, nano.rank, scale) for _ in range(2))

    def forward(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Adapted embeddings, float32 `[n, image tokens + longest, width]`, and how many count.

        A question comes after its image. Without one, nothing stands in its place.
        """
        image = self.nano_image(self.connector(prompt.features))
        text = self.nano_text(self.embeddings(prompt.ids))
        joined = torch.cat([image, text], 1)
        tokens = image.shape[1]
        lengths = prompt.mask.sum(1) + tokens * prompt.pictured
        if not bool(prompt.pictured.all()):
            places = torch.arange(joined.shape[1], device=joined.device).expand(joined.shape[:2])
            start = torch.where(prompt.pictured, 0, tokens)[:, None]
            order = (places + start) % joined.shape[1]
            joined = joined.gather(1, order[..., None].expand_as(joined))
        return joined, lengths


def attach_nano(
    connector: Connector, embeddings: nn.Embedding | Table, nano: Nano, seed: int
) -> AttachedAdapter:
    """The client's half, frozen but for NanoAdapters that are drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        half = ClientHalf(connector, embeddings, nano)
    half.requires_grad_(False)
    named = {
        f"{name}.{part}": parameter
        for name in (IMAGE, TEXT)
        for part, parameter in half.get_submodule(name).named_parameters()
    }
    for parameter in named.values():
        parameter.requires_grad_()
    return AttachedAdapter(half, named, None)
