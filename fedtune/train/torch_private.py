"""Gradients of single examples by PyTorch, for `train.private`.

Each comes from a backward pass of its own: exact for any module and any loss. Memory does not grow
with the batch. For MiniLM on one CPU core it takes 2.2 times as long as a plain
step, and up to 5 times while other processes use the memory bus: the base is read once for each
example. The faster ways are not exact for everything. `torch.func.vmap` (1.1 times) raises an
error for a Hugging Face encoder, which looks into its attention mask to choose a kernel.
Opacus' hooks (1.2 times) assume that the loss is a plain mean over the batch and that every
weight is used by its own layer; for any other loss, such as a mean over tokens, they give
gradients that look right and depend on the other examples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fedtune.adapter.lora import AttachedAdapter
from fedtune.errors import ConfigError
from fedtune.privacy.randomness import SecureRandom
from fedtune.train.private import ExampleGradient

ExampleLoss = Callable[[int], Tensor]


def example_gradient(
    attached: AttachedAdapter, loss: ExampleLoss, random: SecureRandom
) -> ExampleGradient:
    """The gradient of the loss of one row; leaves it in the adapter too.

    Torch's own generator, for dropout, is seeded anew for each row.
    """

    def gradient(row: int) -> NDArray[np.float32]:
        # In one stream of dropout masks an example more would change the masks of those after
        # it, and so their gradients, by more than one clip.
        torch.manual_seed(int(random.uint64(1)[0]))
        attached.zero_grad()
        loss(row).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return attached.read_gradient()

    return gradient


def refuse_batch_statistics(attached: AttachedAdapter) -> None:
    """Raise `ConfigError` if a layer would learn statistics of the examples it sees.

    They would leak past the noise. Puts the adapter in training mode. Such layers of the
    frozen base are in evaluation mode and may stay.
    """
    attached.train_mode()
    for name, layer in attached.module.named_modules():
        # A batch normalization without running statistics needs more than one example.
        learns = isinstance(layer, _NormBase) and (
            layer.track_running_stats or isinstance(layer, nn.modules.batchnorm._BatchNorm)
        )
        if learns and layer.training:
            raise ConfigError(
                f"record-level privacy cannot train {type(layer).__name__} '{name}': it mixes "
                "the examples of a batch; use GroupNorm or LayerNorm, or leave it frozen"
            )
