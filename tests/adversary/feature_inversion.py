"""Attack: what is on an image, read off the image tokens that a client sends.

The server has connector and NanoAdapter-I as every client has them, and public images of the same
kind. It sends those through both, with noise of its own drawing where clients add some, and trains
the way back (as He et al. 2019, "Model inversion attacks against collaborative inference", for a
black box): a small network to colour and shape, and a linear map to 16 × 16 pixels. Both are
measured against the best guess of an attacker who sees nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

SIDE = 16
_RIDGES = (1e2, 1e3, 1e4, 1e5, 1e6)
Tokens = NDArray[np.float32]
Noise = Callable[[Tokens], Tokens]


@dataclass(frozen=True)
class Pictures:
    """What the attacker wants to know: `pixels` float32 `[n, 3 · 16 · 16]` in [0, 1], and words.

    `colours` and `shapes` are int64 `[n]`.
    """

    pixels: NDArray[np.float32]
    colours: NDArray[np.int64]
    shapes: NDArray[np.int64]

    def select(self, rows: slice) -> Pictures:
        """Some of them."""
        return Pictures(self.pixels[rows], self.colours[rows], self.shapes[rows])


@dataclass(frozen=True)
class Recovered:
    """How well: shares of `colours` and `shapes`; the pixels' mean squared error."""

    colours: float
    shapes: float
    error: float


def read_pictures(files: Sequence[Path], words: Sequence[tuple[str, ...]]) -> Pictures:
    """Small images, and the codes of their words (colour, shape)."""
    from PIL import Image

    pixels = []
    for file in files:
        with Image.open(file) as image:
            small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
            pixels.append(np.asarray(small, np.float32).ravel() / 255)
    kinds = [sorted({row[place] for row in words}) for place in range(2)]
    codes = [np.array([kinds[place].index(row[place]) for row in words]) for place in range(2)]
    return Pictures(np.stack(pixels), *codes)


def attack(
    tokens: Tokens,
    pictures: Pictures,
    public: int,
    noise: Noise | None = None,
    epochs: int = 40,
    seed: int = 0,
) -> Recovered:
    """Train on the first `public` of the images, and measure on the others.

    `tokens` are float32 `[n, tokens, width]` as they are without noise, which is drawn anew for
    every epoch of training.
    """
    known, hidden = pictures.select(slice(public)), pictures.select(slice(public, None))
    seen = _seen(tokens[public:], noise)
    model = _train(tokens[:public], known, noise, epochs, seed)
    with torch.inference_mode():
        colours, shapes = (part.argmax(1).numpy() for part in model(torch.from_numpy(seen)))
    from_tokens = _seen(tokens[:public], noise)
    return Recovered(
        float((colours == hidden.colours).mean()),
        float((shapes == hidden.shapes).mean()),
        _pixel_error(from_tokens, known.pixels, seen, hidden.pixels),
    )


def best_guess(pictures: Pictures, public: int) -> Recovered:
    """Without seeing anything: the commonest words and the mean image of the public ones."""
    known, hidden = pictures.select(slice(public)), pictures.select(slice(public, None))
    return Recovered(
        float((hidden.colours == np.bincount(known.colours).argmax()).mean()),
        float((hidden.shapes == np.bincount(known.shapes).argmax()).mean()),
        float(((hidden.pixels - known.pixels.mean(0)) ** 2).mean()),
    )


class _Inverter(nn.Module):
    """All tokens of an image, float32 `[n, tokens · width]` → scores of colours and of shapes."""

    def __init__(self, width: int, colours: int, shapes: int, hidden: int = 256) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Dropout(0.2)
        )
        self.colours, self.shapes = nn.Linear(hidden, colours), nn.Linear(hidden, shapes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.body(x)
        return self.colours(found), self.shapes(found)


def _train(
    tokens: Tokens, pictures: Pictures, noise: Noise | None, epochs: int, seed: int
) -> _Inverter:
    rng = np.random.default_rng(seed)
    colours, shapes = torch.from_numpy(pictures.colours), torch.from_numpy(pictures.shapes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _Inverter(tokens[0].size, 1 + int(colours.max()), 1 + int(shapes.max()))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
        for _ in range(epochs):
            seen = torch.from_numpy(_seen(tokens, noise))
            for rows in torch.from_numpy(rng.permutation(len(seen))).split(32):
                by_colour, by_shape = model(seen[rows])
                loss = functional.cross_entropy(by_colour, colours[rows])
                loss = loss + functional.cross_entropy(by_shape, shapes[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.eval()


def _pixel_error(x: Tokens, pixels: Tokens, seen: Tokens, hidden: Tokens) -> float:
    """Of ridge regression, with the ridge that is best for the private images themselves.

    No attacker could choose it so: a bound on what a linear one reaches.
    """
    mean, scale = x.mean(0), x.std(0).mean()
    x, seen = (x - mean) / scale, (seen - mean) / scale
    square, across = x @ x.T, seen @ x.T
    centre = pixels.mean(0)
    errors = []
    for ridge in _RIDGES:
        weights = np.linalg.solve(square + np.float32(ridge) * np.eye(len(x)), pixels - centre)
        errors.append(float(((across @ weights + centre - hidden) ** 2).mean()))
    return min(errors)


def _seen(tokens: Tokens, noise: Noise | None) -> Tokens:
    n, count, width = tokens.shape
    rows = tokens.reshape(n * count, width)
    return (rows if noise is None else noise(rows)).reshape(n, count * width)
