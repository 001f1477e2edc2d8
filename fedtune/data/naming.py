"""Names that come from data: in which order they stand and how an error shows them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

_INTEGER = re.compile(r"[+-]?[0-9]+", re.ASCII)
_MAX_SHOWN = 60
_MAX_LISTED = 8


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """The distinct names in order; by number if all are integers, so that 10 comes after 9."""
    distinct = set(names)
    # More digits than a 64-bit number has are an identifier, and slow to convert.
    if all(len(name) < 20 and _INTEGER.fullmatch(name) for name in distinct):
        return tuple(sorted(distinct, key=lambda name: (int(name), name)))
    return tuple(sorted(distinct))


def quoted(name: object) -> str:
    """`name` in quotes, on one line and not too long."""
    text = repr(name)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 4] + "..." + text[-1]


def listed(items: Collection[str]) -> str:
    """The first few of `items` with commas, and how many more there are."""
    shown: Sequence[str] = list(items)[:_MAX_LISTED]
    more = len(items) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
