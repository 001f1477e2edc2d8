"""What PyTorch makes of a few batches, for a device to compare with: see `edge.verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from fedtune.edge.build.model import EdgeModel
from fedtune.edge.reference import LEARNING_RATES, MARKS, WEIGHT_DECAY, batch_of
from fedtune.train.texts import IGNORED, Batch, next_tokens
from fedtune.types import Float32Vector

BATCHES, ROWS, TOKENS = 5, 4, 24


def make_reference(model: EdgeModel, labels: int, path: Path, seed: int) -> None:
    """Write batches, a starting adapter, and what PyTorch makes of them, without dropout."""
    rng = np.random.default_rng(seed)
    adapter = model.adapter
    before = adapter.read()
    # Not as a run starts: a B of zeros would hide whatever is wrong with A.
    start = before + rng.normal(0, 0.02, before.size).astype(np.float32)
    tensors: dict[str, NDArray[Any]] = {"start": start}
    config: Any = model.base.config
    vocabulary, causal = int(config.vocab_size), model.task == "causal-lm"
    written = _write(model, rng, vocabulary) if causal else None
    for number in range(BATCHES):
        ids = rng.integers(0, vocabulary, (ROWS, TOKENS - number))
        if written is not None:
            ids = written[number, :, : TOKENS - number]
        mask = (np.arange(TOKENS - number) < rng.integers(4, TOKENS, (ROWS, 1))).astype(np.int64)
        tensors[f"ids-{number}"] = np.where(mask == 1, ids, model.pad_id)
        tensors[f"mask-{number}"] = mask
        tensors[f"labels-{number}"] = (
            next_tokens(tensors[f"ids-{number}"], mask) if causal else rng.integers(0, labels, ROWS)
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small batches are slower on several
    adapter.module.eval()
    try:
        first = batch_of(tensors, 0)
        adapter.write(start)
        with torch.no_grad():
            inputs = [torch.from_numpy(array) for array in (first.ids, first.mask)]
            tensors["logits"] = model.logits(*inputs).numpy()
        tensors["loss"] = np.array([_backward(model, first)], np.float32)
        tensors["gradient"] = adapter.read_gradient()
        for name, lr in LEARNING_RATES[model.task].items():
            tensors |= _train(model, name, lr, start, tensors)
    finally:
        adapter.write(before)
        torch.set_num_threads(threads)
    path.write_bytes(save({k: np.ascontiguousarray(v) for k, v in tensors.items()}))


def _write(model: EdgeModel, rng: np.random.Generator, vocabulary: int) -> NDArray[np.int64]:
    """Texts that a language model itself writes, int64 `[BATCHES, ROWS, TOKENS]`.

    Tokens at random would be like no text: their gradients are of another kind.
    """
    ids = rng.integers(0, vocabulary, (BATCHES * ROWS, 1))
    with torch.no_grad():
        while ids.shape[1] < TOKENS:
            so_far = torch.from_numpy(ids)
            logits = model.logits(so_far, torch.ones_like(so_far)).numpy()
            last = logits.reshape(*ids.shape, -1)[:, -1]
            drawn = (last + rng.gumbel(size=last.shape)).argmax(-1)  # from their softmax
            ids = np.concatenate([ids, drawn[:, None]], axis=1)
    return ids.reshape(BATCHES, ROWS, TOKENS)


def _train(
    model: EdgeModel,
    name: Literal["sgd", "adamw"],
    lr: float,
    start: Float32Vector,
    tensors: dict[str, NDArray[Any]],
) -> dict[str, NDArray[Any]]:
    adapter = model.adapter
    adapter.write(start)
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    optimizer = kinds[name]([adapter.flat], lr=lr, weight_decay=WEIGHT_DECAY)
    found: dict[str, NDArray[Any]] = {}
    for step in range(1, MARKS[-1] + 1):
        _backward(model, batch_of(tensors, (step - 1) % BATCHES))
        optimizer.step()
        if step in MARKS:
            found[f"{name}-{step}"] = adapter.read()
    return found


def _backward(model: EdgeModel, batch: Batch) -> float:
    ids, mask, labels = (torch.from_numpy(array) for array in batch)
    model.adapter.zero_grad()
    loss = torch.nn.functional.cross_entropy(model.logits(ids, mask), labels, ignore_index=IGNORED)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return float(loss.detach())
