"""Cross-entropy in numpy, for those who have no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedtune.train.texts import IGNORED


def cross_entropy(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """The loss of each row, float64 `[n]`, 0 where the label is `IGNORED`.

    `logits` is float64 `[n, classes]`.
    """
    shifted = logits - logits.max(-1, keepdims=True)
    total = np.log(np.exp(shifted).sum(-1))
    counts = labels != IGNORED
    found = total - shifted[np.arange(len(labels)), np.where(counts, labels, 0)]
    return np.where(counts, found, 0.0)


def cross_entropy_slope(
    logits: NDArray[np.float64], labels: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The gradient of the sum of losses by the logits: softmax - one-hot; every label counts."""
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    found: NDArray[np.float64] = raised / raised.sum(-1, keepdims=True)
    found[np.arange(len(labels)), labels] -= 1
    return found
