"""Attack: which tokens a client sent, read off their embeddings.

The server has the token table, and the NanoAdapter-T of the round, since it aggregates it; so it
can send every token of the vocabulary through both and look which one comes nearest to what it got.
With noise of density exp(-eta ‖z‖) that is the likeliest token: nothing better can be done with one
embedding if all tokens are as likely as each other. Whoever knows more than that about what people
ask does better: `likeliest_question`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedtune.privacy.metric import clip_scale

Rows = NDArray[np.float32]
_AT_ONCE = 8192


def adapted_table(table: Rows, adapter: nn.Module, clip: float | None = None) -> Rows:
    """What each row of the table is when a client sends it without noise, `[tokens, width]`."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(table), _AT_ONCE):
            parts.append(adapter(torch.from_numpy(table[start : start + _AT_ONCE])).numpy())
    rows = np.concatenate(parts)
    return rows if clip is None else (rows * clip_scale(rows, clip)[:, None]).astype(np.float32)


def distances(seen: Rows, rows: Rows) -> NDArray[np.float32]:
    """Euclidean, `[seen, rows]`."""
    found = torch.cdist(torch.from_numpy(seen), torch.from_numpy(np.ascontiguousarray(rows)))
    return found.numpy()


def nearest_tokens(seen: Rows, rows: Rows) -> NDArray[np.int64]:
    """The place of the nearest row of each embedding `[n, width]`, int64 `[n]`."""
    return distances(seen, rows).argmin(1)


def likeliest_tokens(copies: NDArray[np.float32], rows: Rows) -> NDArray[np.int64]:
    """The likeliest token of each, from all `copies` `[times, n, width]` that were sent of it.

    The logarithms of the densities add up: the row whose distances have the least sum.
    """
    return np.sum([distances(copy, rows) for copy in copies], 0).argmin(1)


def likeliest_question(
    seen: Sequence[Rows], questions: Sequence[Sequence[int]], rows: Rows
) -> NDArray[np.int64]:
    """Which of the `questions` (token ids) each sequence of embeddings is, int64 `[n]`.

    For an attacker who knows what is asked, such as the templates of a form. Only questions of the
    sequence's own length count: noise does not hide it.
    """
    found = []
    for embeddings in seen:
        sums = [
            np.linalg.norm(embeddings - rows[list(ids)], axis=1).sum()
            if len(ids) == len(embeddings)
            else np.inf
            for ids in questions
        ]
        found.append(int(np.argmin(sums)))
    return np.array(found, np.int64)
