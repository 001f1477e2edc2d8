"""An adapter in two parts: one is shared by all clients, the other never leaves its client.

Partial model personalization (Pillutla et al. 2022, arXiv 2204.03809): the manifest that travels
is of the shared part alone, so nothing that handles what travels knows of the other. SPA
(arXiv 2403.07088) does so with side parameters of a language model, FedPer (arXiv 1912.00818)
with the last layers. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ConfigError
from fedtune.types import Float32Vector, Manifest

_MOST_NAMES = 24  # of a hundred layers, the rest of the list tells nothing new


@dataclass(frozen=True)
class Parts:
    """The manifest `whole`, and `shared`, which is what travels of it, in the same order.

    `start` (float32 `[whole.size]`) is the seeded adapter: a client without a private part of its
    own yet has the private values in it, and so has the server.
    """

    whole: Manifest
    shared: Manifest
    start: Float32Vector = field(repr=False)

    @property
    def private_size(self) -> int:
        """Number of values that do not travel."""
        return self.whole.size - self.shared.size

    def join(self, shared: Float32Vector, private: Float32Vector) -> Float32Vector:
        """The whole adapter; both are float32, in the order of the whole."""
        found = np.empty(self.whole.size, np.float32)
        found[~self._is_private], found[self._is_private] = shared, private
        return found

    def shared_of(self, whole: Float32Vector) -> Float32Vector:
        """The part that travels, of a vector with a value for each of the adapter."""
        return whole[~self._is_private]

    def private_of(self, whole: Float32Vector) -> Float32Vector:
        """The part that does not."""
        return whole[self._is_private]

    @cached_property
    def _is_private(self) -> NDArray[np.bool_]:
        shared = set(self.shared.tensors)
        marks = [tensor not in shared for tensor in self.whole.tensors]
        return np.repeat(marks, [tensor.size for tensor in self.whole.tensors])


def parts_of(patterns: Sequence[str], manifest: Manifest, start: Float32Vector) -> Parts | None:
    """The parts as `shared_manifest` has them; None if no tensor is private."""
    return Parts(manifest, shared_manifest(patterns, manifest), start) if patterns else None


def shared_manifest(patterns: Sequence[str], manifest: Manifest) -> Manifest:
    """What travels of an adapter of which the tensors that fit `adapter.private` do not.

    A pattern is one or more parts of a tensor's name, between dots: `nano_text`, `layer.5`,
    `lora_B`. Raises `ConfigError` if a pattern fits no tensor, or if nothing is left to share.
    """
    names = [tensor.name for tensor in manifest.tensors]
    for pattern in patterns:
        if not any(_fits(pattern, name) for name in names):
            raise ConfigError(f"adapter.private: '{pattern}' fits no tensor; {_listed(names)}")
    shared = Manifest(
        tuple(t for t in manifest.tensors if not any(_fits(p, t.name) for p in patterns))
    )
    if not shared.tensors:
        raise ConfigError(f"adapter.private leaves nothing to share; {_listed(names)}")
    return shared


def _fits(pattern: str, name: str) -> bool:
    return f".{pattern}." in f".{name}."


def _listed(names: list[str]) -> str:
    rest = f", and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"this adapter has {', '.join(names[:_MOST_NAMES])}{rest}"
