"""fedtune: federated and on-device fine-tuning; clients train small adapters, data stays home.

Importing this package is cheap: torch, transformers and Flower are imported when they are
first needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.adapter.lora import LoRA
    from fedtune.simulation.api import Client, Run, simulate

__all__ = ["Client", "LoRA", "Run", "simulate"]

_HOMES = {
    "Client": "fedtune.simulation.api",
    "LoRA": "fedtune.adapter.lora",
    "Run": "fedtune.simulation.api",
    "simulate": "fedtune.simulation.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedtune' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
