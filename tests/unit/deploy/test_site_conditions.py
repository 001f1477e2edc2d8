"""Which conditions are met, what is said of them, and when a site joins and leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from doctor_helpers import only, statuses
from machine_files import FakeMachine

from fedtune.config import ClientConfig, Conditions, Config, load_client
from fedtune.deploy import participation
from fedtune.deploy.conditions import is_critical, judge
from fedtune.deploy.doctor.findings import Examination
from fedtune.deploy.doctor.site import examine_conditions
from fedtune.deploy.participation import NotNow, Participation
from fedtune.deploy.readings import Readings, Unreadable
from fedtune.deploy.site_files import SiteFiles
from fedtune.errors import ConfigError
from fedtune.flower.envelope import CONVERSATION
from fedtune.secagg.keys import Identity
from fedtune.wire.envelope import Kind, seal_envelope

SATURDAY, NOON = 5, 12 * 60
NIGHTS = ("22:00-06:00", "sun 00:00-24:00")
IDLE = Readings(SATURDAY, NOON, 0.8, True, 0.1, 45.0, 2_000_000_000)
BROKEN = Unreadable(Path("/sys/broken"), "cannot be read (Input/output error)")


def conditions(**values: object) -> Conditions:
    return Conditions.model_validate({key.replace("_", "-"): v for key, v in values.items()})


@pytest.mark.parametrize(
    ("key", "limit", "read", "value", "met", "text"),
    [
        ("min-battery", 0.4, "charge", 0.4, True, "battery 40 %, at least 40 %"),
        ("min-battery", 0.4, "charge", 0.399, False, "battery 39 %, below 40 %"),
        ("min-battery", 0.4, "charge", None, True, "no battery"),
        ("min-battery", 1.0, "charge", 1.0, True, "battery 100 %, at least 100 %"),
        ("min-battery", 0.0, "charge", 0.0, True, "battery 0 %, at least 0 %"),
        ("mains-only", True, "on_mains", True, True, "on mains"),
        ("mains-only", True, "on_mains", False, False, "not on mains"),
        ("max-load", 0.5, "load", 0.5, True, "load 0.50 per core, at most 0.5"),
        ("max-load", 0.5, "load", 0.51, False, "load 0.51 per core, above 0.5"),
        ("max-temperature", 70.0, "temperature", 70.0, True, "70.0 °C, at most 70"),
        ("max-temperature", 70.0, "temperature", 70.1, False, "70.1 °C, above 70"),
        ("max-temperature", -5.0, "temperature", -4.0, False, "-4.0 °C, above -5"),
        ("min-free-memory-mb", 500, "free_memory", 5 * 10**8, True, "500 MB free, at least 500"),
        ("min-free-memory-mb", 500, "free_memory", 499_999_999, False, "499 MB free, below 500"),
        ("hours", ("sat 09:00-13:00",), "minute", NOON, True, "sat 12:00, in sat 09:00-13:00"),
        ("hours", NIGHTS, "minute", NOON, False, f"sat 12:00, not in {' or '.join(NIGHTS)}"),
        ("hours", NIGHTS, "minute", 0, True, f"sat 00:00, in {' or '.join(NIGHTS)}"),
    ],
)
def test_one_condition(
    key: str, limit: object, read: str, value: object, met: bool, text: str
) -> None:
    [found] = judge(Conditions.model_validate({key: limit}), replace(IDLE, **{read: value}))
    assert (found.key, found.met, found.text, found.unreadable) == (key, met, text, None)
    # What cannot be read is not met, and is told with its file.
    if key != "hours":
        [found] = judge(Conditions.model_validate({key: limit}), replace(IDLE, **{read: BROKEN}))
        assert (found.key, found.met, found.unreadable) == (key, False, BROKEN)
        assert found.text == f"{key}: /sys/broken: cannot be read (Input/output error)"


def test_nothing_is_asked_by_default() -> None:
    dreadful = Readings(SATURDAY, NOON, 0.0, False, 9.0, 99.0, 0)
    assert judge(Conditions(), dreadful) == []
    assert not is_critical(Conditions(), dreadful)


@pytest.mark.parametrize(
    ("charge", "on_mains", "critical"),
    [
        (0.04, False, True),
        (0.05, False, False),
        (0.04, True, False),
        (0.04, BROKEN, False),
        (BROKEN, False, False),
        (None, True, False),
    ],
)
def test_a_battery_that_is_nearly_empty(charge: object, on_mains: object, critical: bool) -> None:
    readings = replace(IDLE, charge=charge, on_mains=on_mains)
    for set_here in ({"min_battery": 0.4}, {"mains_only": True}):
        assert is_critical(conditions(**set_here), readings) is critical
    assert not is_critical(conditions(max_load=0.5), readings)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('hours = ["22:00-06"]', "conditions.hours: '22:00-06' is no window of time"),
        ("min-battery = 40", "conditions.min-battery: "),
        ("min-battery = nan", "conditions.min-battery: "),
        ("max-load = 0", "conditions.max-load: "),
        ("max-temperature = inf", "conditions.max-temperature: "),
        ("min-free-memory-mb = 0.5", "conditions.min-free-memory-mb: "),
        ("unmetered-only = true", "conditions.unmetered-only: unknown key"),
    ],
)
def test_conditions_that_make_no_sense(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "client.toml"
    file.write_text(f"[conditions]\n{line}\n")
    with pytest.raises(ConfigError) as raised:
        load_client(file)
    assert words in str(raised.value)


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def test_what_the_doctor_says(machine: FakeMachine) -> None:
    examination = Examination()
    wanted = {"min_battery": 0.9, "mains_only": True, "max_temperature": 50.0}
    examine_conditions(examination, conditions(sysfs=str(machine.sys), **wanted))
    assert statuses(examination) == {
        "min-battery": "warning",
        "mains-only": "warning",
        "max-temperature": "ok",
    }
    assert only(examination, "min-battery").finding == "battery 80 %, below 90 %"
    machine.zone(0, "none")
    machine.supply("AC", online="1")
    examination = Examination()
    examine_conditions(examination, conditions(sysfs=str(machine.sys), **wanted))
    assert only(examination, "mains-only").status == "ok"
    found = only(examination, "max-temperature")
    assert (found.status, "thermal_zone0/temp: says 'none'" in found.finding) == ("problem", True)


SESSION = b"s" * 32


def envelope(kind: Kind) -> bytes:
    return seal_envelope(Identity.generate("server"), kind, SESSION, b"")


class Rounds:
    """Requests to a site on a fake machine, whose `say` is kept."""

    def __init__(self, machine: FakeMachine, masked: bool = True, timeout: float = 600.0) -> None:
        federation = Config.model_validate(
            {
                "update": {"clip": 1.0, "bits": 16},
                "secagg": {"enabled": masked, "stage-timeout": timeout},
                "rounds": {"timeout": timeout},
            }
        )
        own = conditions(sysfs=str(machine.sys), min_battery=0.4)
        files = SiteFiles(Path("client.toml"), ClientConfig(conditions=own), federation)
        self.said: list[str] = []
        self.participation = Participation(files, self.said.append)

    def ask(self, kind: Kind | None, well: bool = True) -> None:
        """A request of secure aggregation, or to train, and its answer."""
        message = "train" if kind in (None, Kind.TRAIN_REQUEST) else CONVERSATION
        self.participation.asked(message, envelope(kind) if kind else b"")
        self.participation.answered(well)

    @property
    def leaves(self) -> bool:
        try:
            self.participation.look()
        except NotNow:
            return True
        return False


@pytest.fixture
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(participation, "LOOK_SECONDS", 0.0)


IN_A_ROUND = (Kind.INVITE, Kind.COHORT, Kind.TRAIN_REQUEST, Kind.SURVIVORS)


@pytest.mark.usefixtures("_often")
def test_a_round_that_was_begun_is_gone_through_with(machine: FakeMachine) -> None:
    rounds = Rounds(machine)
    rounds.ask(Kind.INVITE)
    machine.supply("BAT0", capacity="39")
    for kind in IN_A_ROUND[1:]:
        rounds.ask(kind)
        assert not rounds.leaves
    rounds.ask(Kind.UNMASKING)
    assert rounds.leaves


@pytest.mark.usefixtures("_often")
@pytest.mark.parametrize("last", IN_A_ROUND)
def test_but_not_with_a_battery_that_is_nearly_empty(machine: FakeMachine, last: Kind) -> None:
    rounds = Rounds(machine)
    for kind in IN_A_ROUND[: IN_A_ROUND.index(last) + 1]:
        rounds.ask(kind)
    machine.supply("BAT0", capacity="4")
    assert rounds.leaves


@pytest.mark.parametrize("masked", [True, False])
def test_no_round_is_begun_any_more(machine: FakeMachine, masked: bool) -> None:
    """Also when it was looked a moment ago, and in the middle of a round that came to nothing."""
    rounds = Rounds(machine, masked)
    first = Kind.INVITE if masked else None
    assert not rounds.leaves
    rounds.ask(first)
    machine.supply("BAT0", capacity="39")
    with pytest.raises(NotNow):
        rounds.ask(first)


@pytest.mark.usefixtures("_often")
def test_what_is_no_part_of_a_round_keeps_nobody(machine: FakeMachine) -> None:
    rounds = Rounds(machine)
    rounds.participation.asked("query", b"hello")
    rounds.participation.answered(True)
    machine.supply("BAT0", capacity="39")
    assert rounds.leaves


@pytest.mark.usefixtures("_often")
def test_nobody_is_kept_by_a_round_in_which_he_has_failed(machine: FakeMachine) -> None:
    rounds = Rounds(machine)
    rounds.ask(Kind.INVITE)
    machine.supply("BAT0", capacity="39")
    rounds.participation.asked(CONVERSATION, b"no envelope")
    assert not rounds.leaves
    rounds.participation.answered(False)
    assert rounds.leaves


@pytest.mark.usefixtures("_often")
def test_nobody_is_kept_by_a_server_that_says_nothing_more(machine: FakeMachine) -> None:
    rounds = Rounds(machine, timeout=1e-6)
    rounds.ask(Kind.INVITE)
    machine.supply("BAT0", capacity="39")
    assert rounds.leaves


@pytest.mark.usefixtures("_often")
def test_what_becomes_unreadable_is_not_met(machine: FakeMachine) -> None:
    rounds = Rounds(machine)
    assert not rounds.leaves
    (machine.sys / "class/power_supply/BAT0/capacity").unlink()
    assert rounds.leaves
    with pytest.raises(ConfigError, match=r"client.toml: conditions.min-battery cannot be .*BAT0"):
        Rounds(machine)
