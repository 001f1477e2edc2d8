"""What is exported."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.adapter.lora import AttachedAdapter
from fedtune.base.classifier import BaseModel


@dataclass(frozen=True)
class EdgeModel:
    """A base model with an attached adapter; `max_length` in tokens."""

    base: BaseModel
    adapter: AttachedAdapter
    pad_id: int
    max_length: int
