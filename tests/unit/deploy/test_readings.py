"""What the kernel says, read from real files: in order, odd, broken and missing."""

from __future__ import annotations

import datetime
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine_files import FakeMachine

from fedtune.deploy.readings import OwnLoad, Reader, Unreadable


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def why(found: object) -> str:
    assert isinstance(found, Unreadable), found
    return str(found)


def test_a_laptop_on_its_battery(machine: FakeMachine) -> None:
    found = machine.reader().read()
    assert (found.charge, found.on_mains) == (0.8, False)
    assert (found.load, found.temperature) == (0.5, 45.0)
    assert found.free_memory == 2_000_000 * 1024


def test_this_machine_says_what_python_says() -> None:
    found = Reader().read()
    load, free = found.load, found.free_memory
    assert isinstance(load, float)
    assert load * (os.cpu_count() or 1) == pytest.approx(os.getloadavg()[0], abs=0.5)
    assert isinstance(free, int)
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert pages * 0.5 < free < total


@pytest.mark.parametrize(
    ("battery", "charge"),
    [
        ({"capacity": "18"}, 0.18),
        ({"capacity": "0"}, 0.0),
        # One that has aged is full and will never say 100.
        ({"status": "Full", "capacity": "97"}, 1.0),
        ({"status": "Not charging", "capacity": "97"}, 0.97),
        ({"capacity": "103"}, 1.0),
    ],
)
def test_the_charge_of_a_battery(
    machine: FakeMachine, battery: dict[str, str], charge: float
) -> None:
    machine.supply("BAT0", **battery)
    assert machine.reader().read().charge == charge


def test_of_several_batteries_the_larger_counts_more(machine: FakeMachine) -> None:
    machine.supply("BAT0", capacity="10", energy_full="23000000")
    machine.supply("BAT1", type="Battery", status="Discharging", capacity="90")
    assert machine.reader().read().charge == 0.5
    machine.supply("BAT1", energy_full="69000000")
    assert machine.reader().read().charge == (10 * 23 + 90 * 69) / (23 + 69) / 100
    for name in ("BAT0", "BAT1"):
        machine.supply(name, capacity="40", energy_full="57750000" if name == "BAT0" else "3")
    assert machine.reader().read().charge == 0.4


def test_batteries_of_a_mouse_or_of_an_empty_bay_do_not_count(machine: FakeMachine) -> None:
    machine.supply("hidpp_battery_0", type="Battery", scope="Device", capacity="3")
    machine.supply("BAT1", type="Battery", present="0")
    assert machine.reader().read().charge == 0.8
    shutil.rmtree(machine.sys / "class/power_supply/BAT0")
    found = machine.reader().read()
    assert (found.charge, found.on_mains) == (None, True)


@pytest.mark.parametrize(
    ("plug", "on_mains"),
    [
        ({"type": "Mains", "online": "0"}, False),
        ({"type": "Mains", "online": "1"}, True),
        ({"type": "USB", "online": "2"}, True),
        ({"type": "USB_PD", "online": "1"}, True),
        ({"type": "Wireless", "online": "1"}, True),
        ({"type": "Wireless", "online": "0"}, False),
    ],
)
def test_plugs(machine: FakeMachine, plug: dict[str, str], on_mains: bool) -> None:
    shutil.rmtree(machine.sys / "class/power_supply/AC")
    machine.supply("plug", **plug)
    assert machine.reader().read().on_mains is on_mains
    # Any other plug that is not in changes nothing.
    machine.supply("other", type="USB", online="0")
    assert machine.reader().read().on_mains is on_mains


@pytest.mark.parametrize(
    ("status", "on_mains"),
    [("Discharging", False), ("Charging", True), ("Not charging", True), ("Full", True)],
)
def test_without_a_plug_the_battery_says_it(
    machine: FakeMachine, status: str, on_mains: bool
) -> None:
    shutil.rmtree(machine.sys / "class/power_supply/AC")
    machine.supply("BAT0", status=status)
    assert machine.reader().read().on_mains is on_mains
    machine.supply("BAT0", status="Unknown")
    assert why(machine.reader().read().on_mains).endswith("BAT0/status: says 'Unknown'")


def test_a_machine_without_power_supplies_is_on_mains(machine: FakeMachine) -> None:
    for empty in (shutil.rmtree, Path.mkdir):
        empty(machine.sys / "class/power_supply")
        found = machine.reader().read()
        assert (found.charge, found.on_mains) == (None, True)
    # But a wrong conditions.sysfs is not such a machine.
    shutil.rmtree(machine.sys)
    found = machine.reader().read()
    for value in (found.charge, found.on_mains, found.temperature):
        assert why(value) == f"{machine.sys}: there is no such folder"


@pytest.mark.parametrize(
    ("zones", "temperature"),
    [
        (["45000", "61500", "38000"], 61.5),
        (["-12500"], -12.5),
        (["-40000", "-3000"], -3.0),
        (["0"], 0.0),
    ],
)
def test_the_hottest_zone(machine: FakeMachine, zones: list[str], temperature: float) -> None:
    for number, text in enumerate(zones):
        machine.zone(number, text)
    machine.zone(10, "-50000")
    assert machine.reader().read().temperature == temperature


def test_a_zone_that_has_no_value_now_is_passed_over(machine: FakeMachine) -> None:
    """As of a radio that is off. A pipe that nobody writes to gives the same error to a reader."""
    radio = machine.zone(1, "0")
    radio.unlink()
    os.mkfifo(radio)
    with os.fdopen(os.open(radio, os.O_RDWR), "wb"):
        assert machine.reader().read().temperature == 45.0
        shutil.rmtree(machine.sys / "class/thermal/thermal_zone0")
        assert "no zone has a value now" in why(machine.reader().read().temperature)
    # Where there is no error, and nothing to read, it is no number.
    assert "says ''" in why(machine.reader().read().temperature)


BAD = [
    ("class/power_supply/BAT0/capacity", "charge"),
    ("class/power_supply/AC/online", "on_mains"),
    ("class/thermal/thermal_zone0/temp", "temperature"),
]


@pytest.mark.parametrize("content", ["", "hot", "nan", "inf", "0x10", "\x00\xff", "1" * 100_000])
@pytest.mark.parametrize(("file", "value"), BAD)
def test_garbage(machine: FakeMachine, file: str, value: str, content: str) -> None:
    (machine.sys / file).write_bytes(content.encode("latin-1"))
    found = why(getattr(machine.reader().read(), value))
    assert found.startswith(f"{machine.sys / file}: says ")
    assert len(found) < len(str(machine.sys / file)) + 200


@pytest.mark.parametrize(("file", "value"), [*BAD, ("class/power_supply/BAT0/type", "charge")])
def test_files_that_are_missing_or_cannot_be_read(
    machine: FakeMachine, file: str, value: str
) -> None:
    path = machine.sys / file
    path.unlink()
    found = why(getattr(machine.reader().read(), value))
    assert found == f"{path}: cannot be read (No such file or directory)"
    # The kernel refuses, whoever asks: there is no memory at the address 0.
    path.symlink_to("/proc/self/mem")
    found = why(getattr(machine.reader().read(), value))
    assert found == f"{path}: cannot be read (Input/output error)"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_this_user_may_not_read(machine: FakeMachine) -> None:
    path = machine.sys / "class/power_supply/BAT0/capacity"
    path.chmod(0)
    assert why(machine.reader().read().charge) == f"{path}: cannot be read (Permission denied)"


def test_a_negative_capacity_is_none(machine: FakeMachine) -> None:
    machine.supply("BAT0", capacity="-1")
    assert why(machine.reader().read().charge).endswith("BAT0/capacity: says -1 %")


def test_what_the_kernel_does_not_say_of_load_and_memory(machine: FakeMachine) -> None:
    (machine.proc / "loadavg").write_text("high\n")
    (machine.proc / "meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable: many kB\n")
    found = machine.reader().read()
    assert why(found.load).endswith("loadavg: says 'high', which is no number")
    assert why(found.free_memory).endswith("meminfo: has no MemAvailable")


def test_what_the_site_itself_takes_is_not_held_against_it(machine: FakeMachine) -> None:
    (machine.proc / "77").mkdir()
    (machine.proc / "77/status").write_text(
        "Name:\tpython\nVmRSS:\t900000 kB\nRssAnon:\t600000 kB\n"
    )
    found = machine.reader().read(own_load=1.5, training=77)
    assert found.load == 0.125
    assert found.free_memory == 2_600_000 * 1024
    assert machine.reader().read(own_load=3.0).load == 0.0
    assert machine.reader().read(training=78).free_memory == 2_000_000 * 1024


def test_own_load_is_what_the_kernel_adds_for_it() -> None:
    """Against the kernel's own arithmetic: fixed point of 11 bits, every five seconds.

    See CALC_LOAD in the kernel's include/linux/sched/loadavg.h; EXP_1 is 1884 of 2048.
    """
    now, kernel = 0.0, 0
    own = OwnLoad(3, lambda: now)
    for working, seconds in ((True, 40), (False, 15), (True, 200), (False, 120), (True, 5)):
        (own.begin if working else own.end)()
        for _ in range(seconds // 5):
            now += 5
            active = (3 if working else 0) << 11
            kernel = (kernel * 1884 + active * (2048 - 1884)) >> 11
            assert own.value == pytest.approx(kernel / 2048, abs=0.02)
    assert own.value < 3 * (1 - math.exp(-5 / 60)) + 3 * math.exp(-125 / 60)


@pytest.fixture
def in_berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")  # needs no database of zones
        yield
    time.tzset()


@pytest.mark.parametrize(
    ("moment", "day", "clock"),
    [
        # A Sunday in spring: after 01:59 comes 03:00.
        ("2025-03-30T00:59:59Z", 6, "01:59"),
        ("2025-03-30T01:00:00Z", 6, "03:00"),
        # A Sunday in autumn: after 02:59 comes 02:00 once more.
        ("2025-10-26T00:59:59Z", 6, "02:59"),
        ("2025-10-26T01:00:00Z", 6, "02:00"),
        ("2025-10-26T01:59:59Z", 6, "02:59"),
        ("2025-10-26T02:00:00Z", 6, "03:00"),
        # A Wednesday, and a second later.
        ("2025-12-31T22:59:59Z", 2, "23:59"),
        ("2025-12-31T23:00:00Z", 3, "00:00"),
    ],
)
def test_local_time(
    machine: FakeMachine, in_berlin: None, moment: str, day: int, clock: str
) -> None:
    machine.now = datetime.datetime.fromisoformat(moment).timestamp()
    found = machine.reader().read()
    assert (found.day, f"{found.minute // 60:02}:{found.minute % 60:02}") == (day, clock)
