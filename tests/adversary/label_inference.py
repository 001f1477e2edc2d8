"""Attack: the answers, read off the gradients that a client sends where it keeps the answers.

With `split.labels = "client"` the server computes the scores, so it knows their softmax p. What the
client sends back is the gradient of the cross-entropy by the scores, p minus the one-hot answer.
Of a gray box the server computes the last state, and gets the gradient by that.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

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


def label_from_state(weight: Scores, gradient: Scores) -> NDArray[np.int64]:
    """The answers by the loss's gradients by states `[n, width]`, for who has the output layer.

    Without an adapter on the output that gradient is (p - e) @ weight, with weight `[answers,
    width]`: solved for p - e, its negative entry is the answer.
    """
    solved, *_ = np.linalg.lstsq(weight.T, gradient.T, rcond=None)
    return negative_entry(solved.T)


def label_by_readout(readout: nn.Module, states: Scores, gradient: Scores) -> NDArray[np.int64]:
    """The same, for who knows the readout too: the answer whose gradient is nearest."""
    distances = []
    answers = readout(torch.from_numpy(states)).shape[1]
    for answer in range(answers):
        x = torch.tensor(states, requires_grad=True)
        labels = torch.full((len(states),), answer)
        loss = functional.cross_entropy(readout(x), labels, reduction="sum")
        (found,) = torch.autograd.grad(loss, x)
        distances.append(np.linalg.norm(found.numpy() - gradient, axis=1))
    return np.stack(distances).argmin(0)
