"""What PyTorch makes of a client's half, for a device to compare with: see `edge.verify_nano`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from fedtune.adapter.nano import Prompt
from fedtune.edge.build.nano_half import Half

SIZES = ((64, 64), (90, 161))  # pixels of images: up to the encoder's size, and down
ROWS, TOKENS = 4, 9


def make_nano_reference(half: Half, path: Path, seed: int) -> None:
    """Write images, a batch, an adapter, a gradient at the cut, and what follows of them."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, NDArray[Any]] = {}
    encoder = half.encoder.of_one_image()
    for number, size in enumerate(SIZES):
        pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        with torch.inference_mode():
            tensors[f"features-{number}"] = encoder(torch.from_numpy(pixels)).numpy()
        tensors[f"pixels-{number}"] = pixels
    features = rng.normal(size=(ROWS, half.connector.features)).astype(np.float16)
    pictured = np.arange(ROWS) % 2 == 0
    lengths = rng.integers(1, TOKENS + 1, ROWS)
    lengths[0] = TOKENS
    mask = (np.arange(TOKENS) < lengths[:, None]).astype(np.int64)
    places = rng.integers(0, len(half.table.tokens), (ROWS, TOKENS)) * mask
    adapter = half.adapter
    before = adapter.read()
    # Not as a run starts: what is zero at first would hide whatever is wrong with the rest.
    start = before + rng.normal(0, 0.02, before.size).astype(np.float32)
    prompt = Prompt(
        torch.from_numpy(features.astype(np.float32)),
        torch.from_numpy(pictured),
        half.table.tokens[torch.from_numpy(places)],
        torch.from_numpy(mask),
    )
    try:
        adapter.write(start)
        embeddings, counted = half.module(prompt)
        counts = np.arange(embeddings.shape[1]) < counted.numpy()[:, None]
        slope = (rng.normal(size=embeddings.shape) * counts[..., None]).astype(np.float32)
        adapter.zero_grad()
        embeddings.backward(torch.from_numpy(slope))
        gradient = adapter.read_gradient()
    finally:
        adapter.write(before)
        adapter.zero_grad()
    with torch.inference_mode():
        tensors["tokens"] = half.connector(prompt.features).numpy()
    tensors |= {
        "start": start,
        "features": features,
        "pictured": pictured,
        "places": places,
        "lengths": counted.numpy(),
        "embeddings": embeddings.detach().numpy(),
        "slope": slope,
        "gradient": gradient,
    }
    path.write_bytes(save({name: np.ascontiguousarray(value) for name, value in tensors.items()}))
