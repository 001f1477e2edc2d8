"""Every kind of message by name: how to encode, decode and build it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedtune.types import RoundContext
from fedtune.wire import codec

ENCODE: dict[str, Callable[[Any], bytes]] = {
    "hello_request": codec.encode_hello_request,
    "hello": codec.encode_hello,
    "train_request": codec.encode_train_request,
    "train_reply": codec.encode_train_reply,
    "evaluate_request": codec.encode_evaluate_request,
    "evaluate_reply": codec.encode_evaluate_reply,
}
DECODE: dict[str, Callable[[bytes, int], Any]] = {
    "hello_request": lambda payload, _: codec.decode_hello_request(payload),
    "hello": lambda payload, _: codec.decode_hello(payload),
    "train_request": codec.decode_train_request,
    "train_reply": codec.decode_train_reply,
    "evaluate_request": codec.decode_evaluate_request,
    "evaluate_reply": lambda payload, _: codec.decode_evaluate_reply(payload),
}
_CLASSES: dict[str, Callable[..., Any]] = {
    "hello": codec.Hello,
    "train_request": codec.TrainRequest,
    "train_reply": codec.TrainReply,
    "evaluate_request": codec.EvaluateRequest,
    "evaluate_reply": codec.EvaluateReply,
}


def build(kind: str, values: dict[str, Any]) -> Any:
    """The typed message of a vector's values; vectors are hex there."""
    if kind == "hello_request":
        return values["run_id"]
    raw = {
        name: bytes.fromhex(value) if name in ("adapter", "update") else value
        for name, value in values.items()
        if name != "context"
    }
    return _CLASSES[kind](context=RoundContext(**values["context"]), **raw)
