"""Flower on a device, where PyCryptodome is not installed, and gRPC only for a base model far away.

A site speaks to Flower's SuperLink over HTTP and masks by itself: it uses neither. But Flower's
`__init__` imports all of Flower, and `flwr.common` a limit of gRPC. Both packages together are
25 MB on the disk, and 20 MB in memory.
"""

from __future__ import annotations

import importlib.util
import sys
import types

_LARGEST_MESSAGE = 2**31 - 1  # GRPC_MAX_MESSAGE_LENGTH in flwr/supercore/grpc.py


def use_without_grpc() -> None:
    """Make `flwr.app` and what a site needs of Flower importable; nothing if all is installed."""
    if all(map(importlib.util.find_spec, ("grpc", "Crypto"))) or "flwr" in sys.modules:
        return
    flower = importlib.util.find_spec("flwr")
    if flower is None or flower.submodule_search_locations is None:
        return  # what needs Flower says so when it imports it
    package = types.ModuleType("flwr")
    package.__path__ = list(flower.submodule_search_locations)
    limits = types.ModuleType("flwr.supercore.grpc")
    limits.__dict__["GRPC_MAX_MESSAGE_LENGTH"] = _LARGEST_MESSAGE
    sys.modules |= {package.__name__: package, limits.__name__: limits}
