"""Windows of local time, as in `22:00-06:00` or `sat,sun 00:00-24:00`."""

from __future__ import annotations

import re
from dataclasses import dataclass

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MINUTES = 24 * 60  # of a day
_DAY = f"(?:{'|'.join(DAYS)})"
_TIME = "[0-9]{2}:[0-9]{2}"
_WINDOW = re.compile(f"(?:(?P<days>{_DAY}(?:,{_DAY})*) )?(?P<begin>{_TIME})-(?P<end>{_TIME})")


@dataclass(frozen=True)
class Window:
    """From minute `begin` of each of `days` (0: Monday) to before minute `end`.

    If `end` is not after `begin`, it is a minute of the next day. Minutes are those that a clock on
    the wall shows: an hour that is repeated in autumn is in a window both times.
    """

    days: frozenset[int]
    begin: int
    end: int

    @classmethod
    def parse(cls, text: str) -> Window:
        """A window as in a client.toml; raises `ValueError`."""
        found = _WINDOW.fullmatch(text)
        begin, end = (_minute(found[name]) if found else -1 for name in ("begin", "end"))
        if found is None or not 0 <= begin < MINUTES or not 0 < end <= MINUTES or begin == end:
            if found is not None and end == 0:
                raise ValueError(f"{text!r} ends at midnight, which is written 24:00")
            raise ValueError(
                f"{text!r} is no window of time; write it as 22:00-06:00, or for some days as "
                "sat,sun 00:00-24:00"
            )
        days = found["days"].split(",") if found["days"] else DAYS
        return cls(frozenset(map(DAYS.index, days)), begin, end)

    def contains(self, day: int, minute: int) -> bool:
        """Whether a minute of a day (0: Monday) is in it."""
        if self.begin < self.end:
            return day in self.days and self.begin <= minute < self.end
        # It belongs to the day on which it begins.
        yesterday = (day - 1) % len(DAYS)
        return (day in self.days and minute >= self.begin) or (
            yesterday in self.days and minute < self.end
        )


def _minute(text: str) -> int:
    """The minute of the day, or -1 if a clock does not show that."""
    hours, minutes = int(text[:2]), int(text[3:])
    return 60 * hours + minutes if hours <= 24 and minutes < 60 else -1
