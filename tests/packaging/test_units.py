"""The systemd units: accepted by systemd itself, as closed as it says, and in step with the CLI."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNITS = {
    "server": ROOT / "server" / "fedtune-server.service",
    "client": ROOT / "client" / "fedtune-client.service",
}
MOST_EXPOSED = 1.4  # of 10, as systemd 252 counts
INSTALLED = "/opt/fedtune/bin/fedtune"
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here"
)


def _directives(role: str) -> dict[str, list[str]]:
    """Values by key, in order; a comment or a section is none."""
    found: dict[str, list[str]] = {}
    for line in UNITS[role].read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            key, equals, value = line.partition("=")
            assert equals, line
            found.setdefault(key, []).append(value)
    return found


@needs_systemd
@pytest.mark.parametrize("role", UNITS)
def test_systemd_accepts_the_unit_without_a_complaint(role: str, tmp_path: Path) -> None:
    # It asks whether the program is there, which is so where fedtune is installed.
    unit = tmp_path / UNITS[role].name
    unit.write_text(UNITS[role].read_text().replace(INSTALLED, sys.executable))
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


@needs_systemd
@pytest.mark.parametrize("role", UNITS)
def test_the_unit_is_as_closed_as_systemd_can_tell(role: str) -> None:
    arguments = ["security", "--offline=true", f"--threshold={MOST_EXPOSED * 10:.0f}"]
    found = subprocess.run(
        ["systemd-analyze", *arguments, "--json=short", UNITS[role]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout
    exposed = {item["json_field"] for item in json.loads(found.stdout) if item["exposure"]}
    # Left open is what it needs: the network, the libraries of its host, and torch's kernels,
    # which are made at run time. The clock's protection names the clock's device.
    assert exposed <= {
        "PrivateNetwork",
        "RestrictAddressFamilies_AF_INET_INET6",
        "RestrictAddressFamilies_AF_UNIX",
        "IPAddressDeny",
        "RootDirectoryOrRootImage",
        "PrivateMounts",
        "DeviceAllow",
        "MemoryDenyWriteExecute",
        "ProcSubset",
    }


@pytest.mark.parametrize("role", UNITS)
def test_the_unit_starts_and_ends_the_command_as_the_command_wants_it(role: str) -> None:
    unit = _directives(role)
    [start] = unit["ExecStart"]
    program, command, file = start.split()
    assert (program, command) == (INSTALLED, role)
    assert Path(file).parent == Path(unit["WorkingDirectory"][0])
    assert Path(file).parent == Path("/var/lib") / unit["StateDirectory"][0]
    assert unit["User"] == ["fedtune"]
    assert unit["UMask"] == ["0077"]
    assert unit["LimitCORE"] == ["0"]
    # Exit codes: fedtune/cli.py. 2 is for good, and a server that was stopped ends with 130.
    assert unit["Restart"] == ["on-failure"]
    assert unit["RestartPreventExitStatus"] == ["2"]
    assert unit.get("SuccessExitStatus", []) == (["130"] if role == "server" else [])
    assert int(unit["StartLimitBurst"][0]) * int(unit["RestartSec"][0]) < int(
        unit["StartLimitIntervalSec"][0]
    )
    assert unit["KillSignal"] == ["SIGTERM"]
    assert unit["KillMode"] == ["mixed"], "the second process is ended by the first"
