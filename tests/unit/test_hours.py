"""Windows of local time: what is written, and which minutes are in them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.hours import DAYS, MINUTES, Window

MON, TUE, WED, THU, FRI, SAT, SUN = range(7)
MINUTE = st.integers(0, MINUTES - 1)


def clock(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"


def written(days: set[int], begin: int, end: int) -> str:
    """A window as a person writes it."""
    names = ",".join(DAYS[day] for day in sorted(days))
    return f"{names} {clock(begin)}-{clock(end or MINUTES)}"


def following(days: set[int]) -> set[int]:
    return {(day + 1) % 7 for day in days}


@pytest.mark.parametrize(
    ("text", "day", "time", "inside"),
    [
        ("09:00-17:30", MON, "08:59", False),
        ("09:00-17:30", MON, "09:00", True),
        ("09:00-17:30", SUN, "17:29", True),
        ("09:00-17:30", SUN, "17:30", False),
        ("22:00-06:00", WED, "21:59", False),
        ("22:00-06:00", WED, "22:00", True),
        ("22:00-06:00", WED, "23:59", True),
        ("22:00-06:00", THU, "00:00", True),
        ("22:00-06:00", THU, "05:59", True),
        ("22:00-06:00", THU, "06:00", False),
        ("00:00-24:00", SUN, "23:59", True),
        ("22:00-24:00", MON, "00:00", False),
        ("sat,sun 00:00-24:00", FRI, "23:59", False),
        ("sat,sun 00:00-24:00", SAT, "00:00", True),
        ("sat,sun 00:00-24:00", SUN, "23:59", True),
        ("sat,sun 00:00-24:00", MON, "00:00", False),
        # It is the night that begins on that day, also over the end of the week.
        ("fri 22:00-06:00", FRI, "05:00", False),
        ("fri 22:00-06:00", FRI, "22:00", True),
        ("fri 22:00-06:00", SAT, "05:59", True),
        ("fri 22:00-06:00", SAT, "22:00", False),
        ("sun 22:00-06:00", MON, "03:00", True),
        ("sun 22:00-06:00", SUN, "03:00", False),
    ],
)
def test_what_is_in_a_window(text: str, day: int, time: str, inside: bool) -> None:
    minute = 60 * int(time[:2]) + int(time[3:])
    assert Window.parse(text).contains(day, minute) is inside


@pytest.mark.parametrize(
    "text",
    [
        "",
        "22:00",
        "22:00-22:00",
        "24:00-06:00",
        "22:00-24:01",
        "25:00-06:00",
        "22:60-06:00",
        "22:00-06:00 ",
        "22:00-06:00\n",
        "22:00 - 06:00",
        "9:00-17:00",
        "Sat 09:00-17:00",
        "sat, sun 09:00-17:00",
        "sat,09:00-17:00",
        "mon-fri 09:00-17:00",
        "٢٢:٠٠-٠٦:٠٠",
    ],
)
def test_what_is_no_window(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no window of time; write it as 22:00-06:00"):
        Window.parse(text)


def test_midnight_at_the_end_is_written_in_one_way() -> None:
    with pytest.raises(ValueError, match=r"'22:00-00:00' ends at midnight, .* 24:00"):
        Window.parse("22:00-00:00")


@given(
    days=st.sets(st.integers(0, 6), min_size=1), begin=MINUTE, length=st.integers(1, MINUTES - 1)
)
def test_a_window_and_what_is_left_out_cover_each_minute_once(
    days: set[int], begin: int, length: int
) -> None:
    """From `begin` to `begin` a day has its window and a rest, or it has none."""
    end = (begin + length) % MINUTES
    windows = [(days, begin, end)]
    # The rest begins a day later, if the window ends then.
    windows.append((days if begin + length < MINUTES else following(days), end, begin))
    if others := set(range(7)) - days:
        windows.append((others, begin, 0))
        if begin:
            windows.append((following(others), 0, begin))
    parsed = [Window.parse(written(*parts)) for parts in windows]
    for day in range(7):
        for minute in range(MINUTES):
            inside = sum(found.contains(day, minute) for found in parsed)
            assert inside == 1, (windows, day, minute)
