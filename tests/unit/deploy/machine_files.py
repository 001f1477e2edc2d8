"""Trees of files like those of the kernel, on a real disk."""

from __future__ import annotations

from pathlib import Path

from fedtune.deploy.readings import Reader

MEMINFO = "MemTotal:       16000000 kB\nMemFree:          100000 kB\nMemAvailable:    2000000 kB\n"


class FakeMachine:
    """`sys` and `proc` in a folder; a laptop on its battery, until files are changed."""

    def __init__(self, folder: Path) -> None:
        self.sys, self.proc = folder / "sys", folder / "proc"
        self.now = 1_750_000_000.0
        (self.sys / "class").mkdir(parents=True)
        self.proc.mkdir()
        (self.proc / "loadavg").write_text("2.00 1.50 1.00 3/456 7890\n")
        (self.proc / "meminfo").write_text(MEMINFO)
        self.supply("BAT0", type="Battery", status="Discharging", capacity="80")
        self.supply("AC", type="Mains", online="0")
        self.zone(0, "45000")

    def supply(self, name: str, **files: str) -> Path:
        return self._write(self.sys / "class/power_supply" / name, files)

    def zone(self, number: int, temperature: str) -> Path:
        folder = self.sys / "class/thermal" / f"thermal_zone{number}"
        return self._write(folder, {"temp": temperature}) / "temp"

    def reader(self, cores: int = 4) -> Reader:
        return Reader(self.sys, self.proc, lambda: self.now, cores)

    @staticmethod
    def _write(folder: Path, files: dict[str, str]) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(f"{text}\n")
        return folder
