"""Whether a machine suits its owner's conditions now: functions of what was read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedtune.config import Conditions
from fedtune.deploy.readings import Readings, Unreadable
from fedtune.errors import ConfigError
from fedtune.hours import DAYS, Window

CRITICAL_CHARGE = 0.05  # below it, on battery, what was begun is left too


@dataclass(frozen=True)
class Judgement:
    """Of one condition: its key, whether it is met, and what was read, in words."""

    key: str
    met: bool
    text: str
    unreadable: Unreadable | None = None


def judge(conditions: Conditions, readings: Readings) -> list[Judgement]:
    """A judgement of each condition that is set, in the order of the reference.

    What cannot be read is not met.
    """
    return list(_judgements(conditions, readings))


def is_critical(conditions: Conditions, readings: Readings) -> bool:
    """Whether the battery is nearly empty, and its owner cares; not if it cannot be read."""
    cares = conditions.mains_only or conditions.min_battery is not None
    charge = readings.charge
    return (
        cares
        and readings.on_mains is False
        and isinstance(charge, float)
        and charge < CRITICAL_CHARGE
    )


def require_readable(path: Path, conditions: Conditions, readings: Readings) -> None:
    """Raise `ConfigError` for a condition of the file `path` that this machine cannot judge."""
    for found in judge(conditions, readings):
        if found.unreadable is not None:
            raise ConfigError(
                f"{path}: conditions.{found.key} cannot be judged on this machine: "
                f"{found.unreadable}; make it readable, or take the key out"
            )


def _judgements(conditions: Conditions, readings: Readings) -> Iterator[Judgement]:
    if conditions.hours:
        yield _hours(conditions.hours, readings.day, readings.minute)
    if conditions.min_battery is not None:
        yield _battery(conditions.min_battery, readings.charge)
    if conditions.mains_only:
        mains = readings.on_mains
        if isinstance(mains, Unreadable):
            yield _unknown("mains-only", mains)
        else:
            yield Judgement("mains-only", mains, "on mains" if mains else "not on mains")
    for key, most, value, what in (
        ("max-load", conditions.max_load, readings.load, "load {:.2f} per core"),
        ("max-temperature", conditions.max_temperature, readings.temperature, "{:.1f} °C"),
    ):
        if most is not None and isinstance(value, Unreadable):
            yield _unknown(key, value)
        elif most is not None and not isinstance(value, Unreadable):
            met = value <= most
            limit = f"{'at most' if met else 'above'} {most:g}"
            yield Judgement(key, met, f"{what.format(value)}, {limit}")
    if (least := conditions.min_free_memory_mb) is not None:
        yield _memory(least, readings.free_memory)


def _hours(hours: tuple[str, ...], day: int, minute: int) -> Judgement:
    met = any(Window.parse(text).contains(day, minute) for text in hours)
    now = f"{DAYS[day]} {minute // 60:02}:{minute % 60:02}"
    return Judgement("hours", met, f"{now}, {'in' if met else 'not in'} {' or '.join(hours)}")


def _battery(least: float, charge: float | Unreadable | None) -> Judgement:
    key = "min-battery"
    if isinstance(charge, Unreadable):
        return _unknown(key, charge)
    if charge is None:
        return Judgement(key, True, "no battery")
    met = charge >= least
    # Down, so that 39.6 % is not said to be below 40 %, while being 40 %.
    percent = math.floor(100 * charge + 1e-9)
    return Judgement(
        key, met, f"battery {percent} %, {'at least' if met else 'below'} {100 * least:g} %"
    )


def _memory(least: int, free: int | Unreadable) -> Judgement:
    key = "min-free-memory-mb"
    if isinstance(free, Unreadable):
        return _unknown(key, free)
    met = free >= least * 10**6
    limit = f"{'at least' if met else 'below'} {least}"
    return Judgement(key, met, f"{free // 10**6} MB free, {limit}")


def _unknown(key: str, found: Unreadable) -> Judgement:
    return Judgement(key, False, f"{key}: {found}", found)
