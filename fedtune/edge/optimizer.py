"""The optimizers of a device, on one flat vector, with torch's arithmetic.

The adapter is small and its optimizer costs nothing beside the passes through the model, so numpy
does it for every runtime. ONNX Runtime's own AdamW has another epsilon and order of bias
correction, which after few steps makes a tenth of an update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from fedtune.types import Float32Vector

BETA1, BETA2 = 0.9, 0.999
EPSILON = 1e-8


class Optimizer(Protocol):
    """Changes parameters in place."""

    def step(self, parameters: Float32Vector, gradient: Float32Vector, lr: float) -> None:
        """One step with this learning rate."""


@dataclass
class Moments:
    """What AdamW remembers: two moments (float32, the adapter's size) and the steps taken."""

    first: Float32Vector
    second: Float32Vector
    steps: int = 0

    @classmethod
    def zeros(cls, size: int) -> Moments:
        """Of an optimizer that has taken no step."""
        return cls(np.zeros(size, np.float32), np.zeros(size, np.float32))


class AdamW:
    """Decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2), as `torch.optim.AdamW`."""

    def __init__(self, moments: Moments, weight_decay: float, epsilon: float = EPSILON) -> None:
        self.moments = moments
        self._weight_decay, self._epsilon = weight_decay, epsilon

    def step(self, parameters: Float32Vector, gradient: Float32Vector, lr: float) -> None:
        """One step with this learning rate."""
        moments = self.moments
        moments.steps += 1
        parameters *= np.float32(1 - lr * self._weight_decay)
        moments.first += np.float32(1 - BETA1) * (gradient - moments.first)
        moments.second *= np.float32(BETA2)
        moments.second += np.float32(1 - BETA2) * gradient * gradient
        correction1 = 1 - BETA1**moments.steps
        correction2 = math.sqrt(1 - BETA2**moments.steps)
        denominator = np.sqrt(moments.second) / np.float32(correction2) + np.float32(self._epsilon)
        parameters -= np.float32(lr / correction1) * moments.first / denominator


class SGD:
    """Plain stochastic gradient descent with an L2 penalty, as `torch.optim.SGD`."""

    def __init__(self, weight_decay: float) -> None:
        self._weight_decay = weight_decay

    def step(self, parameters: Float32Vector, gradient: Float32Vector, lr: float) -> None:
        """One step with this learning rate."""
        parameters -= np.float32(lr) * (gradient + np.float32(self._weight_decay) * parameters)


def make_optimizer(
    name: Literal["adamw", "sgd"], weight_decay: float, moments: Moments
) -> Optimizer:
    """The optimizer that a configuration names; only AdamW uses `moments`."""
    return AdamW(moments, weight_decay) if name == "adamw" else SGD(weight_decay)


def clip_norm(gradient: Float32Vector, largest: float) -> Float32Vector:
    """`gradient` scaled down to L2 norm `largest` if it is longer, as torch does it."""
    norm = float(np.linalg.norm(gradient))
    return gradient * np.float32(min(1.0, largest / (norm + 1e-6)))
