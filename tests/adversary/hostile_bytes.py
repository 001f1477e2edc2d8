"""Protobuf by hand: the same message in other bytes, and bytes that are no message."""

from __future__ import annotations

from collections.abc import Iterator


def varint(value: int, longer: int = 0) -> bytes:
    """A varint; with `longer` padded by so many bytes that change nothing."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    for _ in range(longer):
        out[-1] |= 0x80
        out.append(0)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
        if data[at - 1] < 0x80:
            return value, at


def fields(data: bytes) -> list[tuple[int, int, bytes]]:
    """Top-level fields: tag, wire type, value with its length if it has one."""
    return list(_fields(data))


def _fields(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    at = 0
    while at < len(data):
        tag, start = _read_varint(data, at)
        kind = tag & 7
        if kind == 0:
            _, end = _read_varint(data, start)
        elif kind == 1:
            end = start + 8
        else:
            assert kind == 2
            length, inner = _read_varint(data, start)
            end = inner + length
        yield tag, kind, data[start:end]
        at = end


def _join(parts: list[tuple[int, int, bytes]], longer_tag: int | None = None) -> bytes:
    return b"".join(
        varint(tag, 1 if place == longer_tag else 0) + value
        for place, (tag, _, value) in enumerate(parts)
    )


def other_spellings(data: bytes) -> dict[str, bytes]:
    """Bytes that an indulgent parser takes for the same message as `data`."""
    parts = fields(data)
    assert _join(parts) == data
    found = {
        "last field first": _join([parts[-1], *parts[:-1]]) if len(parts) > 1 else data,
        "a tag that is too long": _join(parts, longer_tag=0),
        "a field twice": _join([parts[0], *parts]) if _single(parts, 0) else data,
        "the last field twice": _join([*parts, parts[-1]]) if _single(parts, -1) else data,
    }
    for place, (tag, kind, value) in enumerate(parts):
        if kind == 0:
            number, _ = _read_varint(value, 0)
            changed = [*parts]
            changed[place] = (tag, kind, varint(number, 2))
            found[f"field {tag >> 3} as a long number"] = _join(changed)
            changed[place] = (tag, kind, varint(number + (1 << 32), 0))
            found[f"field {tag >> 3} with more bits"] = _join(changed)
        if kind == 2:
            length, inner = _read_varint(value, 0)
            changed = [*parts]
            changed[place] = (tag, kind, varint(length, 1) + value[inner:])
            found[f"field {tag >> 3} with a long length"] = _join(changed)
    return {how: other for how, other in found.items() if other != data}


def _single(parts: list[tuple[int, int, bytes]], place: int) -> bool:
    """Whether the field is one that a message has once, as far as one can see."""
    return [tag for tag, _, _ in parts].count(parts[place][0]) == 1


def _nested_groups(depth: int) -> bytes:
    start, end = varint(31 << 3 | 3), varint(31 << 3 | 4)
    return start * depth + end * depth


def spoiled(data: bytes) -> dict[str, bytes]:
    """Bytes that are not to be taken for a message at all."""
    unknown = 31 << 3
    return {
        "nothing": b"",
        "cut": data[:-1],
        "cut in half": data[: len(data) // 2],
        "a zero behind": data + b"\0",
        "itself behind": data + data,
        "an unknown number": data + varint(unknown) + b"\1",
        "an unknown empty string": data + varint(unknown | 2) + b"\0",
        "an unknown string in front": varint(unknown | 2) + b"\3abc" + data,
        "an unknown double": data + varint(unknown | 1) + bytes(8),
        "an unknown group": data + _nested_groups(1),
        "deep groups": data + _nested_groups(500),
        "very deep groups": _nested_groups(20_000),
        "groups without an end": varint(31 << 3 | 3) * 20_000,
        "a length of 100 MB": data + varint(unknown | 2) + varint(100_000_000) + b"x",
        "a body of 100 MB": varint(5 << 3 | 2) + varint(100_000_000) + data,
        "a length of 2^63": data + varint(unknown | 2) + varint(1 << 63) + b"x",
        "a number without an end": data + varint(unknown) + b"\xff" * 30,
        "text": b"GET / HTTP/1.1\r\n\r\n",
    }
