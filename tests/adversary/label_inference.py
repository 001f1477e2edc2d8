"""Attack: the answers, read off the gradients that a client sends where it keeps the answers.

With `split.labels = "client"` the server computes the scores, so it knows their softmax p. What the
client sends back is the gradient of the cross-entropy by the scores, p minus the one-hot answer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]


def softmax(scores: Scores) -> Scores:
    """Of each row `[n, answers]`."""
    powers = np.exp(scores - scores.max(1, keepdims=True))
    found: Scores = powers / powers.sum(1, keepdims=True)
    return found


def negative_entry(gradient: Scores) -> NDArray[np.int64]:
    """The one place of each row `[n, answers]` that is below zero: the answer."""
    return gradient.argmin(1)


def likeliest_label(scores: Scores, gradient: Scores) -> NDArray[np.int64]:
    """The answer whose gradient p - e is nearest in direction: clipped or noisy ones too."""
    p = softmax(scores)
    candidates = p[:, None] - np.eye(p.shape[1], dtype=np.float32)
    candidates = candidates / np.linalg.norm(candidates, axis=2, keepdims=True)
    return np.einsum("nac,nc->na", candidates, gradient).argmax(1)
