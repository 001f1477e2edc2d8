"""A site that takes part only while its machine suits: it waits, joins, and leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deployed import MASKED, SITES, Federation
from e2e_helpers import Command, wait_gone, wait_until
from process_changes import look_often

from fedtune.deploy.participation import NOT_NOW

DEVICE = "clinic-3"
STAGE_SECONDS, ROUND_SECONDS = 10.0, 20.0


def test_a_site_takes_part_while_its_battery_is_charged(
    make_federation: Callable[..., Federation], tmp_path: Path
) -> None:
    federation = make_federation(
        sites=(*SITES, DEVICE),
        tables={
            "train": {"steps": 2},
            "rounds": {"count": 200, "timeout": ROUND_SECONDS},
            "secagg": {"colluding": 0.2, "stage-timeout": STAGE_SECONDS},
        },
        listen={"patience": 0.5},
    )
    file = federation.site(DEVICE) / "client.toml"
    keys = f'[conditions]\nmin-battery = 0.4\nsysfs = "{tmp_path / "sys"}"\n'
    file.write_text(file.read_text().replace("[conditions]\n", keys))
    blind = federation.warm_client(DEVICE)
    assert blind.wait() == 2
    assert f"conditions.min-battery cannot be judged on this machine: {tmp_path}" in blind.stderr

    battery = Battery(tmp_path / "sys", 10)
    server = federation.server()
    wait_until(lambda: "listening at" in server.stderr, "the server to listen")
    device = federation.warm_client(DEVICE, [look_often])
    others = [federation.warm_client(name) for name in SITES]
    # The round is not held up, and nobody asks for what the device does not have: its data.
    assert federation.record(1)["clients"] == list(SITES)
    assert last_line(device) == "taking no part: battery 10 %, below 40 %"
    assert device.workers() == []

    battery.charge(90)
    joined = federation.await_record(lambda r: DEVICE in r["clients"], "the device")
    assert "taking part: all conditions are met" in device.stderr
    [training] = device.workers()

    # In the middle of a round: this one it goes through with, the next one it does not begin.
    with federation.held(DEVICE, MASKED) as last:
        battery.charge(39)
    record = federation.record(last)
    assert (DEVICE in record["clients"], record["late"]) == (True, {})
    # The server did not wait for its last word.
    assert record["seconds"] < STAGE_SECONDS
    gone = federation.await_record(
        lambda r: DEVICE not in {*r["clients"], *r["failed"]}, "the device gone"
    )
    # It may have been invited to one round, which began while it left.
    assert gone <= last + 2
    declined = {f"asked to advertise: {why}" for why in (NOT_NOW, "no answer within 10 s")}
    for record in map(federation.record, range(last + 1, gone + 1)):
        assert record["clients"] == list(SITES)
        assert set(record["failed"].values()) <= declined
    wait_until(lambda: last_line(device).endswith("battery 39 %, below 40 %"), "it to say why")
    wait_gone([training])

    # Nearly empty, it leaves at once, and nobody waits for the update that does not come.
    battery.charge(90)
    federation.await_record(lambda r: DEVICE in r["clients"], "the device again")
    [training] = device.workers()
    with federation.held(DEVICE, MASKED) as left:
        before = switches(training)
        wait_until(lambda: switches(training) > before + 10, "it to try to store its update")
        battery.charge(3)
        wait_gone([training])
        record = federation.record(left)
    assert record["clients"] == list(SITES)
    assert record["failed"] == {DEVICE: NOT_NOW}
    assert record["seconds"] < ROUND_SECONDS
    assert not federation.reached(DEVICE, left, MASKED)

    # And back: with a memory in which a round is left open.
    battery.charge(90)
    back = federation.await_record(lambda r: DEVICE in r["clients"], "the device once more")
    battery.charge(10)
    wait_until(lambda: device.workers() == [], "it to leave")
    said = [line.split(maxsplit=1)[1] for line in device.stderr.splitlines()]
    assert [line for line in said if line.startswith("taking")] == [
        "taking no part: battery 10 %, below 40 %",
        "taking part: all conditions are met",
        "taking no part: battery 39 %, below 40 %",
        "taking part: all conditions are met",
        "taking no part: battery 3 %, below 40 %",
        "taking part: all conditions are met",
        "taking no part: battery 10 %, below 40 %",
    ]
    server.interrupt()
    assert server.wait() == 130
    device.interrupt()
    assert device.wait() == 130
    for client in others:
        client.interrupt()
    records = federation.check()
    assert 1 < joined <= last < left < back <= len(records)
    assert all(set(SITES) <= set(record["clients"]) for record in records)
    entries = federation.verified(DEVICE)
    started = [details for event, details in entries if event == "site-started"]
    assert len(started) == 3


class Battery:
    """The files that the kernel has for one."""

    def __init__(self, sysfs: Path, percent: int) -> None:
        self._folder = sysfs / "class/power_supply/BAT0"
        self._folder.mkdir(parents=True)
        (self._folder / "type").write_text("Battery\n")
        (self._folder / "status").write_text("Discharging\n")
        self.charge(percent)

    def charge(self, percent: int) -> None:
        # As in the kernel, nobody reads half of it.
        new = self._folder / "new"
        new.write_text(f"{percent}\n")
        new.replace(self._folder / "capacity")


def switches(pid: int) -> int:
    """How often a process has gone to sleep; one that nobody asks anything does not wake up."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def last_line(command: Command) -> str:
    """What a site has said last, without the time."""
    return command.stderr.splitlines()[-1].split(maxsplit=1)[1]
