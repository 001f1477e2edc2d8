"""What the kernel says of this machine: time, power, load, temperature, memory."""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

LARGEST_FILE = 1 << 16  # bytes; none of these has more
LOAD_SECONDS = 60.0  # time constant of the kernel's average
Value = TypeVar("Value")
# Of a thermal zone that is in order and has no value now, such as that of a radio that is off.
_NO_VALUE = (errno.ENODATA, errno.EAGAIN)


@dataclass(frozen=True)
class Unreadable:
    """A value that cannot be had, and why."""

    path: Path
    why: str

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


@dataclass(frozen=True)
class Readings:
    """What was read at one moment."""

    day: int
    """Day of the week, local time; 0: Monday."""
    minute: int
    """Minute of that day, as a clock on the wall shows it."""
    charge: float | Unreadable | None
    """Of all batteries together, 1: full; None: there is none."""
    on_mains: bool | Unreadable
    load: float | Unreadable
    """Average of the last minute, per core."""
    temperature: float | Unreadable
    """°C of the hottest thermal zone."""
    free_memory: int | Unreadable
    """Bytes that can be had without swapping."""


class OwnLoad:
    """What this site's own work adds to the kernel's load average of the last minute."""

    def __init__(self, threads: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`threads` run while it works."""
        self._threads, self._clock = threads, clock
        self._running, self._average, self._changed = 0, 0.0, clock()

    def begin(self) -> None:
        """Work begins."""
        self._average, self._changed = self.value, self._clock()
        self._running = self._threads

    def end(self) -> None:
        """Work ends."""
        self._average, self._changed = self.value, self._clock()
        self._running = 0

    @property
    def value(self) -> float:
        """Its part of the average, of all cores together."""
        kept = math.exp(-(self._clock() - self._changed) / LOAD_SECONDS)
        return self._average * kept + self._running * (1 - kept)


class Reader:
    """Reads them."""

    def __init__(
        self,
        sysfs: Path = Path("/sys"),
        proc: Path = Path("/proc"),
        clock: Callable[[], float] = time.time,
        cores: int | None = None,
    ) -> None:
        self._sysfs, self._proc, self._clock = sysfs, proc, clock
        self._cores = cores or os.cpu_count() or 1

    def read(self, own_load: float = 0.0, training: int | None = None) -> Readings:
        """Read all, without what this site itself takes: its load, and the memory of a process."""
        time.tzset()  # a machine can be taken to another zone
        now = time.localtime(self._clock())
        return Readings(
            now.tm_wday,
            60 * now.tm_hour + now.tm_min,
            _tried(self._charge),
            _tried(self._on_mains),
            _tried(lambda: max(0.0, self._load() - own_load) / self._cores),
            _tried(self._temperature),
            _tried(lambda: self._free_memory() + self._held_by(training)),
        )

    def _charge(self) -> float | None:
        batteries = self._supplies("Battery")
        if not batteries:
            return None
        charges = [_charge_of(battery) for battery in batteries]
        # Of two batteries the larger counts more, where all say how large they are.
        for name in ("energy_full", "charge_full"):
            with suppress(_CannotRead):
                sizes = [_number(battery / name) for battery in batteries]
                if min(sizes) > 0:
                    return _mean(charges, sizes)
        return _mean(charges, [1.0] * len(charges))

    def _on_mains(self) -> bool:
        batteries = self._supplies("Battery")
        if not batteries:
            return True
        if plugs := self._supplies("Mains", "USB", "Wireless"):
            return any(_number(plug / "online") > 0 for plug in plugs)
        states = {_text(battery / "status") for battery in batteries}
        if unknown := states - {"Charging", "Discharging", "Not charging", "Full"}:
            raise _CannotRead(batteries[0] / "status", f"says {unknown.pop()!r}")
        return "Discharging" not in states

    def _load(self) -> float:
        path = self._proc / "loadavg"
        return _parsed(path, _text(path).partition(" ")[0])

    def _temperature(self) -> float:
        pattern = self._folder("class/thermal") / "thermal_zone*" / "temp"
        zones = sorted(pattern.parent.parent.glob(pattern.parent.name))
        found = [value for zone in zones if (value := _zone(zone / "temp")) is not None]
        if not found:
            has = "no zone has a value now" if zones else "there is no such file"
            raise _CannotRead(pattern, has)
        return max(found) / 1000

    def _free_memory(self) -> int:
        return _kilobytes(self._proc / "meminfo", "MemAvailable")

    def _held_by(self, process: int | None) -> int:
        """Bytes that would be free without that process. Files that it has mapped are free now."""
        with suppress(_CannotRead):  # it may be about to end
            return _kilobytes(self._proc / f"{process}/status", "RssAnon") if process else 0
        return 0

    def _supplies(self, *kinds: str) -> list[Path]:
        """Folders of the power supplies of this machine, not of its mouse, that are of a kind."""
        try:
            folders = sorted(self._folder("class/power_supply").iterdir())
        except FileNotFoundError:
            return []  # a machine that is always on mains
        except OSError as error:
            raise _CannotRead(self._sysfs / "class/power_supply", _why(error)) from error
        # There were kinds such as USB_PD.
        return [
            folder
            for folder in folders
            if _text(folder / "type").partition("_")[0] in kinds
            and _optional(folder / "scope") != "Device"
            and _optional(folder / "present") != "0"
        ]

    def _folder(self, name: str) -> Path:
        if not self._sysfs.is_dir():
            raise _CannotRead(self._sysfs, "there is no such folder")
        return self._sysfs / name


class _CannotRead(Exception):
    def __init__(self, path: Path, why: str) -> None:
        super().__init__(path, why)
        self.found = Unreadable(path, why)


def _tried(read: Callable[[], Value]) -> Value | Unreadable:
    try:
        return read()
    except _CannotRead as error:
        return error.found


def _charge_of(battery: Path) -> float:
    # A battery that has aged is full before it has the capacity that it began with.
    if _optional(battery / "status") == "Full":
        return 1.0
    path = battery / "capacity"
    percent = _number(path)
    if percent < 0:
        raise _CannotRead(path, f"says {percent:g} %")
    return min(percent, 100) / 100


def _mean(values: list[float], weights: list[float]) -> float:
    total = sum(value * weight for value, weight in zip(values, weights, strict=True))
    # Two batteries at 40 % are not below 40 %.
    return round(total / sum(weights), 6)


def _zone(path: Path) -> float | None:
    try:
        return _number(path)
    except _CannotRead as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in _NO_VALUE:
            return None
        raise


def _optional(path: Path) -> str | None:
    try:
        return _text(path)
    except _CannotRead as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def _number(path: Path) -> float:
    return _parsed(path, _text(path))


def _parsed(path: Path, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _CannotRead(path, f"says {text[:40]!r}, which is no number")
    return value


def _kilobytes(path: Path, name: str) -> int:
    """The value of a line like `name:   123 kB`, in bytes."""
    for line in _text(path).splitlines():
        key, _, value = line.partition(":")
        if key == name and (number := value.removesuffix("kB").strip()).isdecimal():
            return int(number) * 1024
    raise _CannotRead(path, f"has no {name}")


def _text(path: Path) -> str:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.read(handle, LARGEST_FILE)
        finally:
            os.close(handle)
    except OSError as error:
        raise _CannotRead(path, _why(error)) from error
    return found.decode(errors="replace").strip()


def _why(error: OSError) -> str:
    return f"cannot be read ({error.strerror})"
