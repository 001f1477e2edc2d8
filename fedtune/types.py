"""Frozen value types that every room shares."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Float32Vector = NDArray[np.float32]
Task = Literal["text-classification", "causal-lm", "visual-question-answering"]


def sha256_hex(data: bytes) -> str:
    """SHA-256 of `data` as 64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest_of(value: object) -> str:
    """SHA-256 of `value` as canonical JSON (sorted keys, no spaces, no NaN)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256_hex(text.encode())


@dataclass(frozen=True)
class TensorSpec:
    """Name and shape of one float32 tensor of an adapter."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Manifest:
    """The tensors of an adapter, in the order in which they travel.

    Server and clients derive it each on their own from the base model and the adapter's
    configuration; equal digests mean that a vector has the same meaning on both sides.
    """

    tensors: tuple[TensorSpec, ...]

    @cached_property
    def size(self) -> int:
        """Number of elements of all tensors together."""
        return sum(t.size for t in self.tensors)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, shapes and order."""
        return digest_of([[t.name, list(t.shape)] for t in self.tensors])

    def split(self, vector: Float32Vector) -> dict[str, Float32Vector]:
        """Views into `vector` (shape `[size]`), by tensor name, in order and in shape."""
        views, start = {}, 0
        for tensor in self.tensors:
            views[tensor.name] = vector[start : start + tensor.size].reshape(tensor.shape)
            start += tensor.size
        return views

    def join(self, tensors: Mapping[str, NDArray[np.float32]]) -> Float32Vector:
        """The flat vector of `tensors`; names and shapes must be exactly the manifest's."""
        if set(tensors) != {t.name for t in self.tensors}:
            raise ValueError("tensor names differ from the manifest")
        vector = np.empty(self.size, np.float32)
        for name, view in self.split(vector).items():
            if tensors[name].shape != view.shape:
                raise ValueError(f"{name} has shape {tensors[name].shape}, not {view.shape}")
            view[...] = tensors[name]
        return vector

    @staticmethod
    def of(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> Manifest:
        """Manifest of `(name, shape)` pairs, in their order."""
        return Manifest(tuple(TensorSpec(name, tuple(shape)) for name, shape in shapes))


@dataclass(frozen=True)
class RoundContext:
    """What one round is about; every message names it and is refused under any other.

    All digests are SHA-256 in hexadecimal. `round` counts from 1.
    """

    run_id: str
    round: int
    base_digest: str
    manifest_digest: str
    config_digest: str
