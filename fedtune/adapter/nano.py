"""NanoAdapters (FedNano, arXiv 2506.14824, section 3): bottlenecks on a language model's inputs.

NanoAdapter-I stands behind the connector, on the image's tokens; NanoAdapter-T behind the table of
embeddings, on the question's. The language model itself is not needed to hold or to move them: a
client has this half, and sends what comes out of it to where the language model is. For gray-box
tuning (arXiv 2502.00796) there is one on its output too, NanoAdapter-O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedtune.adapter.lora import AttachedAdapter
from fedtune.base.answering import Head
from fedtune.base.connector import Connector
from fedtune.base.kit import Table
from fedtune.errors import ConfigError

IMAGE, TEXT, READOUT = "nano_image", "nano_text", "readout"


@dataclass(frozen=True)
class Nano:
    """Settings of NanoAdapters; without `output_rank` there is none on the output."""

    rank: int = 32
    output_rank: int | None = None

    def __post_init__(self) -> None:
        for rank in (self.rank, self.output_rank):
            if rank is not None and rank < 1:
                raise ConfigError(f"NanoAdapter rank must be at least 1, got {rank}")


class NanoAdapter(nn.Module):
    """x + s · up(GELU(down(x / s))), with `up` zero at first: round 0 is the base model.

    `scale` s is about the root mean square of the values of x, so that the bottleneck sees values
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


class GrayBoxReadout(nn.Module):
    """NanoAdapter-O on the language model's last state, and the answers' rows of its output layer.

    The rows are frozen.
    """

    weight: Tensor

    def __init__(self, head: Head, rank: int) -> None:
        super().__init__()
        self.nano_output = NanoAdapter(head.weight.shape[1], rank, head.scale)
        self.register_buffer("weight", head.weight)

    def forward(self, states: Tensor) -> Tensor:
        """float32 `[n, width]` → scores, float32 `[n, answers]`."""
        scores: Tensor = self.nano_output(states) @ self.weight.T
        return scores


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
    """All of the model that is not the language model: connector, table, and what is trained.

    `readout` makes scores of what the language model gives.
    """

    def __init__(
        self,
        connector: Connector,
        embeddings: nn.Embedding | Table,
        nano_image: nn.Module,
        nano_text: nn.Module,
        readout: nn.Module,
    ) -> None:
        super().__init__()
        self.connector, self.embeddings = connector, embeddings
        self.nano_image, self.nano_text, self.readout = nano_image, nano_text, readout

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
    connector: Connector,
    embeddings: nn.Embedding | Table,
    nano: Nano,
    seed: int,
    head: Head | None = None,
) -> AttachedAdapter:
    """The client's half, frozen but for NanoAdapters that are drawn from `seed`.

    `nano.output_rank` needs `head`. Raises `ConfigError` if connector and table are of two widths.
    """
    check_widths(connector, embeddings)
    width = embeddings.embedding_dim
    scale = float(connector.length) / width**0.5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        image, text = (NanoAdapter(width, nano.rank, scale) for _ in range(2))
        readout: nn.Module = nn.Identity()
        if nano.output_rank is not None:
            if head is None:
                raise ValueError("a NanoAdapter-O without a head")
            readout = GrayBoxReadout(head, nano.output_rank)
    return attach_half(ClientHalf(connector, embeddings, image, text, readout))


def check_widths(connector: Connector, embeddings: nn.Embedding | Table) -> None:
    """Raise `ConfigError` if connector and table are not of one language model."""
    width = embeddings.embedding_dim
    if connector.width != width:
        raise ConfigError(
            f"the connector makes tokens of {connector.width} values, this base model takes "
            f"{width}; pretrain one for it: fedtune nano pretrain-connector"
        )


def attach_half(half: ClientHalf) -> AttachedAdapter:
    """A client's half, frozen but for its NanoAdapters and readout."""
    half.requires_grad_(False)
    named = {
        f"{name}.{part}": parameter
        for name in (IMAGE, TEXT, READOUT)
        for part, parameter in half.get_submodule(name).named_parameters()
    }
    for parameter in named.values():
        parameter.requires_grad_()
    return AttachedAdapter(half, named, None)
