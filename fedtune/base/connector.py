"""The connector: image features → tokens in a language model's space of embeddings.

It is pretrained once, centrally, on public images with captions, and frozen from then on: what a
federation trains are the NanoAdapters behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from fedtune.errors import BaseModelError
from fedtune.files import write_atomic
from fedtune.types import sha256_hex

SUFFIX = ".safetensors"
_MOST_BYTES = 256 << 20


class Connector(nn.Module):
    """A layer norm and an MLP of one hidden layer: features → `tokens` embeddings.

    `length` scales them to the length that embeddings of the language model have.
    """

    length: Tensor

    def __init__(self, features: int, width: int, tokens: int) -> None:
        super().__init__()
        self.features, self.width, self.tokens = features, width, tokens
        self.norm = nn.LayerNorm(features)
        self.hidden = nn.Linear(features, width)
        self.out = nn.Linear(width, tokens * width)
        self.register_buffer("length", torch.ones(()))

    def forward(self, features: Tensor) -> Tensor:
        """float32 `[n, features]` → float32 `[n, tokens, width]`."""
        found = self.out(functional.gelu(self.hidden(self.norm(features))))
        tokens = found.view(-1, self.tokens, self.width)
        return functional.normalize(tokens, dim=-1) * self.length


@dataclass(frozen=True)
class Pretraining:
    """How a connector is pretrained."""

    steps: int = 1500
    batch_size: int = 64
    lr: float = 1e-3
    seed: int = 0


def pretrain(
    features: NDArray[np.float16],
    targets: NDArray[np.float32],
    settings: Pretraining,
    progress: Callable[[int, int, float], None] | None = None,
) -> Connector:
    """Learn to say what is on an image with the embeddings of the words that describe it.

    `features` are `[n, features]`, `targets` the embeddings of each image's caption, float32
    `[n, words, width]`: token i shall point where the embedding of word i points. The loss is one
    minus their cosine. No pass through the language model is needed, so it takes seconds.
    """
    count, words, width = targets.shape
    x, y = torch.from_numpy(features.astype(np.float32)), torch.from_numpy(targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        connector = Connector(x.shape[1], width, words)
    connector.length.copy_(y.norm(dim=-1).mean())
    optimizer = torch.optim.AdamW(connector.parameters(), lr=settings.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    rng = np.random.default_rng(settings.seed)
    for step in range(settings.steps):
        rows = rng.choice(count, min(settings.batch_size, count), replace=False)
        loss = (1 - functional.cosine_similarity(connector(x[rows]), y[rows], dim=-1)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, settings.steps, float(loss))
    return connector.eval().requires_grad_(False)


def nearest_words(connector: Connector, features: Tensor, words: Sequence[Tensor]) -> Tensor:
    """Which of each place's words a token is nearest to, int64 `[n, tokens]`.

    `words` has the embeddings to choose from at each place, float32 `[choices, width]`.
    """
    with torch.inference_mode():
        found = connector(features)
        return torch.stack(
            [
                (functional.normalize(found[:, place]) @ functional.normalize(choices).T).argmax(-1)
                for place, choices in enumerate(words)
            ],
            1,
        )


def save_connector(connector: Connector, path: Path) -> str:
    """Write it as safetensors in half precision; returns the file's SHA-256. Raises `OSError`."""
    data = save({name: value.half() for name, value in connector.state_dict().items()})
    write_atomic(path, data)
    return sha256_hex(data)


def load_connector(path: Path, digest: str | None = None) -> tuple[Connector, str]:
    """A frozen connector and its file's SHA-256, which must be `digest` if that is given.

    Raises `BaseModelError`.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise BaseModelError(f"connector {path}: larger than {_MOST_BYTES >> 20} MiB")
        found = sha256_hex(path.read_bytes())
        if digest is not None and found != digest:
            raise BaseModelError(
                f"connector {path}: its digest is {found}, base.connector-digest says {digest}; "
                "this is another connector, or the file has changed"
            )
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        width, features = tensors["hidden.weight"].shape
        connector = Connector(features, width, tensors["out.weight"].shape[0] // width)
        connector.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise BaseModelError(
            f"connector {path}: cannot be loaded: {error}; make one with: "
            "fedtune nano pretrain-connector"
        ) from error
    return connector.eval().requires_grad_(False), found
