"""Write wire_v1.json: messages as hex bytes with their values, and bytes to be refused.

    python tests/vectors/make_wire_v1.py

The encoder below is written from the protobuf encoding guide alone and shares no code with
fedtune, so the file is a second opinion. Any other implementation of the wire format can test
itself against it. `vector_bytes` is the length of adapter or update that the receiver expects.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).with_name("wire_v1.json")
DIGESTS = {"base_digest": "11" * 32, "manifest_digest": "a5" * 32, "config_digest": "ff" * 32}
CONTEXT: dict[str, Any] = {"run_id": "2026-study", "round": 300, **DIGESTS}

Fields = list[tuple[int, Any]]


def varint(number: int) -> bytes:
    """Base 128, least significant group first."""
    groups = []
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])


def encode(fields: Fields) -> bytes:
    """Fields in their order; all have presence, so zeros are written too."""
    out = b""
    for number, value in fields:
        if isinstance(value, float):
            out += varint(number << 3 | 1) + struct.pack("<d", value)
        elif isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return out


def context(**changes: Any) -> bytes:
    """The context as a nested message."""
    values = {**CONTEXT, **changes}
    digests = [values[name] for name in DIGESTS]
    raw = [bytes.fromhex(d) if isinstance(d, str) else d for d in digests]
    fields: Fields = [(1, values["run_id"]), (2, values["round"])]
    return encode([*fields, *zip((3, 4, 5), raw, strict=True)])


ADAPTER = struct.pack("<3f", 1.0, -2.5, 0.15625)
UPDATE = struct.pack("<3e", 0.5, -1.0, 65504.0)
TINY = 5e-324  # the smallest double: no precision is lost on the way


def hello(client: Any = "St. Mary — Köln", train: int = 1000, test: int = 0, **changes: Any):
    """Fields of a Hello."""
    return [(1, 1), (2, context(**changes)), (3, client), (4, train), (5, test)]


def train_reply(
    update: bytes = UPDATE, examples: int = 7, loss: float = 0.1, seconds: float = TINY
) -> Fields:
    """Fields of a TrainReply."""
    return [(1, 1), (2, context()), (3, update), (4, examples), (5, loss), (6, seconds)]


def evaluate_reply(examples: int, correct: int, loss_sum: float) -> Fields:
    """Fields of an EvaluateReply."""
    return [(1, 1), (2, context()), (3, examples), (4, correct), (5, loss_sum)]


def adapter_request(adapter: bytes = ADAPTER, number: int = 3, **changes: Any) -> Fields:
    """Fields of a TrainRequest (3) and of an EvaluateRequest (4)."""
    return [(1, 1), (2, context(**changes)), (number, adapter)]


def good() -> list[dict[str, Any]]:
    """Messages and the values that they hold."""
    request = {"context": CONTEXT, "adapter": ADAPTER.hex()}
    cases: list[tuple[str, int, Fields, dict[str, Any]]] = [
        ("hello_request", 0, [(1, 1), (2, "2026-study")], {"run_id": "2026-study"}),
        (
            "hello",
            0,
            hello(round=0),
            {
                "context": {**CONTEXT, "round": 0},
                "client": "St. Mary — Köln",
                "train_examples": 1000,
                "test_examples": 0,
            },
        ),
        ("train_request", 12, adapter_request(), request),
        ("evaluate_request", 12, adapter_request(number=4), request),
        (
            "train_reply",
            6,
            train_reply(),
            {
                "context": CONTEXT,
                "update": UPDATE.hex(),
                "examples": 7,
                "loss": 0.1,
                "train_seconds": TINY,
            },
        ),
        (
            "evaluate_reply",
            0,
            evaluate_reply(10**12, 10**12, 1e300),
            {"context": CONTEXT, "examples": 10**12, "correct": 10**12, "loss_sum": 1e300},
        ),
    ]
    return [
        {"kind": kind, "vector_bytes": size, "hex": encode(fields).hex(), "values": values}
        for kind, size, fields, values in cases
    ]


def bad() -> list[dict[str, Any]]:
    """Bytes that a receiver refuses."""
    nan, inf = float("nan"), float("inf")
    long = encode(adapter_request())
    cases: list[tuple[str, str, int, bytes]] = [
        ("bad_version_2", "hello_request", 0, encode([(1, 2), (2, "r")])),
        ("bad_version_absent", "hello_request", 0, encode([(2, "r")])),
        ("bad_run_id_empty", "hello_request", 0, encode([(1, 1)])),
        ("bad_run_id_of_257", "hello_request", 0, encode([(1, 1), (2, "r" * 257)])),
        ("bad_run_id_utf8", "hello_request", 0, encode([(1, 1), (2, b"\xff\xfe")])),
        ("bad_empty", "hello_request", 0, b""),
        ("bad_unknown_field", "hello_request", 0, encode([(1, 1), (2, "r"), (9, 1)])),
        ("bad_wire_type", "hello_request", 0, encode([(1, b"\x01"), (2, "r")])),
        ("bad_over_limit", "hello_request", 0, encode([(1, 1), (2, "r" * 5000)])),
        ("bad_client_empty", "hello", 0, encode(hello(client=""))),
        ("bad_client_of_257", "hello", 0, encode(hello(client="x" * 257))),
        ("bad_client_control", "hello", 0, encode(hello(client="a\x1b[2J"))),
        ("bad_client_newline", "hello", 0, encode(hello(client="a\nb"))),
        ("bad_count", "hello", 0, encode(hello(train=10**12 + 1))),
        ("bad_test_count", "hello", 0, encode(hello(test=2**64 - 1))),
        ("bad_no_context", "hello", 0, encode([(1, 1), (3, "x"), (4, 1)])),
        ("bad_digest_of_31", "hello", 0, encode(hello(base_digest=b"\x11" * 31))),
        ("bad_digest_of_33", "hello", 0, encode(hello(manifest_digest=b"\x11" * 33))),
        ("bad_digest_empty", "hello", 0, encode(hello(config_digest=b""))),
        ("bad_context_field", "hello", 0, encode([(1, 1), (2, context() + b"\x48\x01"), (3, "x")])),
        ("bad_adapter_short", "train_request", 12, encode(adapter_request(ADAPTER[:-1]))),
        ("bad_adapter_long", "train_request", 12, encode(adapter_request(ADAPTER + b"\0"))),
        ("bad_adapter_empty", "evaluate_request", 12, encode(adapter_request(b"", 4))),
        ("bad_cut", "train_request", 12, long[:-5]),
        ("bad_kind", "evaluate_request", 12, long),
        ("bad_no_test_count", "hello", 0, encode(hello()[:-1])),
        ("bad_no_seconds", "train_reply", 6, encode(train_reply()[:-1])),
        ("bad_no_loss_sum", "evaluate_reply", 0, encode(evaluate_reply(3, 2, 1.0)[:-1])),
        ("bad_update_short", "train_reply", 6, encode(train_reply(UPDATE[:-2]))),
        ("bad_no_examples", "train_reply", 6, encode(train_reply(examples=0))),
        ("bad_examples", "train_reply", 6, encode(train_reply(examples=10**12 + 1))),
        ("bad_loss_nan", "train_reply", 6, encode(train_reply(loss=nan))),
        ("bad_loss_inf", "train_reply", 6, encode(train_reply(loss=inf))),
        ("bad_loss_negative", "train_reply", 6, encode(train_reply(loss=-0.5))),
        ("bad_seconds", "train_reply", 6, encode(train_reply(seconds=-1.0))),
        ("bad_seconds_nan", "train_reply", 6, encode(train_reply(seconds=nan))),
        ("bad_correct", "evaluate_reply", 0, encode(evaluate_reply(3, 4, 1.0))),
        ("bad_loss_sum_nan", "evaluate_reply", 0, encode(evaluate_reply(3, 2, nan))),
        ("bad_loss_sum_minus_inf", "evaluate_reply", 0, encode(evaluate_reply(3, 2, -inf))),
        ("bad_evaluated", "evaluate_reply", 0, encode(evaluate_reply(10**12 + 1, 2, 1.0))),
    ]
    return [
        {"name": name, "kind": kind, "vector_bytes": size, "hex": data.hex()}
        for name, kind, size, data in cases
    ]


def document() -> dict[str, Any]:
    """The whole file."""
    return {"good": good(), "bad": bad()}


if __name__ == "__main__":
    text = json.dumps(document(), indent=1, ensure_ascii=False)
    OUTPUT.write_text(text + "\n", encoding="utf-8")
