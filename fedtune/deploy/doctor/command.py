"""What `fedtune doctor` prints."""

from __future__ import annotations

import json
import logging
from collections import Counter
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedtune.deploy.doctor.examine import examine
from fedtune.deploy.doctor.findings import Examination
from fedtune.report.words import plural, printable

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red", "skipped": "dim"}


def doctor(file: Path | None, measured: bool, as_json: bool, debug: bool) -> int:
    """Examine this machine; returns the exit code, 1 if there is a problem."""
    logging.basicConfig(format="%(levelname)s %(message)s")
    logging.getLogger("fedtune.deploy.doctor").setLevel(logging.DEBUG if debug else logging.WARNING)
    role, examination = examine(file, measured)
    if as_json:
        value = {"role": role, "file": str(file) if file else None, **examination.to_json()}
        print(json.dumps(value, ensure_ascii=False))
    else:
        _show(examination, Console())
    return 1 if examination.failed else 0


def _show(examination: Examination, console: Console) -> None:
    findings = examination.findings
    for group, members in groupby(findings, lambda finding: finding.group):
        table = Table.grid(padding=(0, 2))
        table.add_column(min_width=7)
        table.add_column(min_width=18)
        table.add_column(overflow="fold")  # digests and paths whole
        for finding in members:
            # Text, not str: rich would read markup out of what the server or a file says.
            words = Text(printable(finding.finding))
            if finding.advice:
                words.append(f"\n→ {printable(finding.advice)}", style="italic")
            table.add_row(Text(finding.status, style=_STYLES[finding.status]), finding.check, words)
        console.print(Text(group, style="bold"))
        console.print(Padding(table, (0, 0, 0, 2)))
    counts = Counter(finding.status for finding in findings)
    console.print(
        f"{plural(counts['problem'], 'problem')}, {plural(counts['warning'], 'warning')}, "
        f"{counts['ok']} ok, {counts['skipped']} skipped"
    )
