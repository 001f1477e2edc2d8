"""Numbers and names in the words that people read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

MISSING = "–"


def percent(share: float | None) -> str:
    """0.681 -> "68.1 %"."""
    if share is None or not math.isfinite(share):
        return MISSING
    return f"{100 * share:.1f} %"


def points(difference: float | None) -> str:
    """A difference of two shares in percentage points, signed: 0.213 -> "+21.3"."""
    if difference is None or not math.isfinite(difference):
        return MISSING
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def loss(value: float | None) -> str:
    """1.2345 -> "1.234"; not a number stays visible, since it means divergence."""
    return MISSING if value is None else f"{value:.3f}"


def count(number: int) -> str:
    """14820 -> "14,820"."""
    return f"{number:,}"


def size(number: float) -> str:
    """Bytes in decimal units: 3145728 -> "3.1 MB"."""
    if number < 1000:
        return f"{number:.0f} B"
    for unit in ("kB", "MB", "GB"):
        number /= 1000
        # 999.95 would be rounded to "1000.0".
        if number < 999.95:
            return f"{number:.1f} {unit}"
    return f"{number / 1000:.1f} TB"


def duration(seconds: float | None) -> str:
    """Seconds in at most two units: "0.4 s", "12 s", "3 min 5 s", "2 h 14 min"."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def plural(number: int, noun: str) -> str:
    """ "1 site", "8 sites"."""
    return f"{count(number)} {noun}" if number == 1 else f"{count(number)} {noun}s"


def noun_of(names: Iterable[str]) -> str:
    """What the clients are: "hospital" for hospital-1, hospital-2, …; "site" when unclear."""
    nouns = {
        match[1].lower() if (match := re.fullmatch(r"([A-Za-z]{3,20})[ _-]?\d+", name)) else None
        for name in names
    }
    noun = nouns.pop() if len(nouns) == 1 else None
    return noun if noun and noun != "client" else "site"


def printable(text: str) -> str:
    """`text` on one line without control characters.

    Names, labels and reasons come from clients. On a terminal an escape sequence in them could
    rewrite what was printed before, and in XML a control character breaks the whole document.
    """
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def shortened(text: str, width: int) -> str:
    """`text`, printable and at most `width` characters long."""
    text = printable(text)
    return text if len(text) <= width else text[: width - 1] + "…"
