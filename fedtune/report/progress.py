"""What a person sees while the rounds run: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from fedtune.records import RoundRecord
from fedtune.report import words

NAMED = 3  # clients that a line names one by one
REASON_WIDTH = 200  # a reason can be a whole traceback; metrics.jsonl keeps all of it
_STAGES = {
    "advertise": "keys",
    "share": "key shares",
    "train": "training",
    "sign": "signing",
    "reveal": "unmasking",
    "evaluate": "evaluating",
}


class Progress(Protocol):
    """Told by the run what happens; shows it."""

    def started(self, title_lines: Sequence[str], planned_rounds: int | None = None) -> None:
        """The run begins; `title_lines` say what it is."""

    def connected(self, absent: Sequence[str], total: int) -> None:
        """All of `total` clients are connected but these; told when it changes."""

    def waiting(self, found: int, wanted: int) -> None:
        """No round can begin yet: `found` of `wanted` clients take part."""

    def round_running(self, round: int, stage: str, waiting_for: Sequence[str], total: int) -> None:
        """In a stage of `round`, all of `total` clients have answered but these."""

    def references_running(self, done: int, total: int) -> None:
        """Of the models to compare with, `done` of `total` are trained."""

    def round_done(self, record: RoundRecord, seconds_left: float | None) -> None:
        """A round ended; `seconds_left` is the estimate for the rest of the run."""

    def note(self, text: str) -> None:
        """Something that a person should know."""

    def finished(self) -> None:
        """Nothing more will come, also after an error. May be called twice."""


def make_progress(stream: TextIO | None = None, quiet: bool = False) -> Progress:
    """The progress display that fits `stream` (None: stderr, so stdout stays clean for `--json`).

    `quiet` keeps only what must not be missed: notes and failed clients.
    """
    stream = sys.stderr if stream is None else stream
    # Asked of the stream, not of rich: FORCE_COLOR in CI is no reason to animate a log file.
    animated = stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    return LiveProgress(stream) if animated and not quiet else PlainProgress(stream, quiet)


class PlainProgress:
    """One line per round, flushed, for log files and pipes."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet
        self._planned: int | None = None
        self._waits = False

    def started(self, title_lines: Sequence[str], planned_rounds: int | None = None) -> None:
        """Print the title."""
        self._planned = planned_rounds
        if not self._quiet:
            for line in title_lines:
                self._print(line)

    def connected(self, absent: Sequence[str], total: int) -> None:
        """Print who is missing."""
        if not self._quiet:
            self._print(_connected(absent, total))

    def waiting(self, found: int, wanted: int) -> None:
        """Say once that nothing happens until they come."""
        if not self._waits and not self._quiet:
            self._print(f"waiting for clients, {wanted - found} of {wanted} are missing")
        self._waits = True

    def round_running(self, round: int, stage: str, waiting_for: Sequence[str], total: int) -> None:
        """Nothing: a log wants results, not motion."""
        self._waits = False

    def references_running(self, done: int, total: int) -> None:
        """Say once that it takes a while."""
        if not done and not self._quiet:
            self._print(f"training {total} models to compare with")

    def round_done(self, record: RoundRecord, seconds_left: float | None) -> None:
        """Print the round, failed clients included, as one line that grep finds whole."""
        failures = [_failure(name, reason) for name, reason in record.failed.items()]
        if self._quiet:
            if failures:
                self._print(f"warning: round {record.round}: {'; '.join(failures)}")
            return
        parts = [
            f"{name} {text}"
            for name, text in (
                ("train loss", words.loss(record.train_loss)),
                ("loss", words.loss(record.loss)),
                ("accuracy", words.percent(record.accuracy)),
                ("up", words.size(record.bytes_up)),
                ("down", words.size(record.bytes_down)),
                ("time", words.duration(record.seconds)),
                ("left", words.duration(seconds_left)),
            )
            if text != words.MISSING
        ]
        parts += [f"warning: {failure}" for failure in failures]
        parts += [f"note: {_late(name, reason)}" for name, reason in record.late.items()]
        self._print(f"round {_of(record.round, self._planned)}: {', '.join(parts)}")

    def note(self, text: str) -> None:
        """Print the note."""
        self._print(f"note: {text}")

    def finished(self) -> None:
        """Nothing: every line was flushed when it was printed."""

    def _print(self, text: str) -> None:
        print(words.printable(text), file=self._stream, flush=True)


class LiveProgress:
    """A live line for the running round; every finished round stays as a row of a table."""

    _HEADER = ("round", "train loss", "loss", "accuracy", "up", "down", "time", "left")
    # 79 columns with the gaps: one row is one line also on the narrowest usual terminal.
    _WIDTHS = (7, 10, 8, 8, 8, 8, 11, 11)

    def __init__(self, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream, stderr=stream is None, highlight=False)
        self._planned: int | None = None
        self._header_printed = False
        self._absent: Sequence[str] = ()
        self._running: tuple[int, str, Sequence[str], int] | None = None
        self._left: float | None = None
        self._task: TaskID | None = None
        self._about = ""
        self._live = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            _State(Column(no_wrap=True)),
            console=self._console,
            transient=True,
            # Training owns the cores; a bar needs no more than this.
            refresh_per_second=4,
            redirect_stdout=False,
        )

    def started(self, title_lines: Sequence[str], planned_rounds: int | None = None) -> None:
        """Print the title and start the live line."""
        self._planned = planned_rounds
        for index, line in enumerate(title_lines):
            self._print(line, "bold" if index == 0 else "")
        self._live.start()

    def connected(self, absent: Sequence[str], total: int) -> None:
        """Print who is missing above the bar."""
        self._absent = absent
        self._print(_connected(absent, total), "dim")
        if self._task is not None and self._running is not None:
            self.round_running(*self._running)

    def waiting(self, found: int, wanted: int) -> None:
        """Move the bar of those who have come."""
        self._running = None
        label = "waiting for clients"
        self._bar(label, label, found, wanted, "clients")

    def round_running(self, round: int, stage: str, waiting_for: Sequence[str], total: int) -> None:
        """Move the bar of the stage, and name those who are late: most others have answered."""
        self._running = (round, stage, waiting_for, total)
        late = waiting_for if len(waiting_for) <= total / 2 else ()
        named = [f"{n} (offline)" if n in self._absent else n for n in late]
        about = f"round {_of(round, self._planned)}"
        label = f"{about} {_STAGES.get(stage, stage)}"
        done = total - len(waiting_for)
        self._bar(about, label, done, total, "clients", self._left, named)

    def references_running(self, done: int, total: int) -> None:
        """Move the bar of the references."""
        label = "to compare with"
        self._bar(label, label, done, total, "models")

    def round_done(self, record: RoundRecord, seconds_left: float | None) -> None:
        """Replace the bar by the row of its round."""
        self._remove_bar()
        self._left = seconds_left
        if not self._header_printed:
            self._print(self._row(self._HEADER), "dim")
            self._header_printed = True
        cells = (
            _of(record.round, self._planned),
            words.loss(record.train_loss),
            words.loss(record.loss),
            words.percent(record.accuracy),
            words.size(record.bytes_up),
            words.size(record.bytes_down),
            words.duration(record.seconds),
            words.duration(seconds_left),
        )
        self._print(self._row(cells))
        for name, reason in record.failed.items():
            self._print(f"  warning: {_failure(name, reason)}", "yellow")
        for name, reason in record.late.items():
            self._print(f"  note: {_late(name, reason)}", "dim")

    def note(self, text: str) -> None:
        """Print the note above the bar."""
        self._print(f"note: {text}", "cyan")

    def finished(self) -> None:
        """Take the live line away and give the cursor back."""
        self._live.stop()

    def _bar(
        self,
        about: str,
        label: str,
        done: int,
        total: int,
        unit: str,
        left: float | None = None,
        late: Sequence[str] = (),
    ) -> None:
        """Draw the one bar there is; its clock starts with each new thing that it is `about`."""
        counts = [f"{done}/{total} {unit}"] if total else []
        counts += [f"late: {_listed(late)}"] if late else []
        total = total or 1  # of work that cannot be counted nothing is done until all is
        fields: dict[str, Any] = {"counts": counts, "left": left}
        if self._task is not None and about == self._about:
            self._live.update(self._task, description=label, completed=done, total=total, **fields)
            return
        self._remove_bar()
        self._task = self._live.add_task(label, completed=done, total=total, **fields)
        self._about = about

    def _remove_bar(self) -> None:
        if self._task is not None:
            self._live.remove_task(self._task)
            self._task = None

    def _row(self, cells: Sequence[str]) -> str:
        return " ".join(f"{cell:>{width}}" for cell, width in zip(cells, self._WIDTHS, strict=True))

    def _print(self, text: str, style: str = "") -> None:
        # Text, not markup: a client may be called "[red]".
        self._console.print(Text(words.printable(text), style=style), soft_wrap=True)


class _State(ProgressColumn):
    """How many of how many, who is late, since when, and how long the whole run still takes."""

    def render(self, task: Task) -> Text:
        """The text behind the bar."""
        elapsed, left = task.elapsed or 0.0, task.fields["left"]
        parts = [*task.fields["counts"], _seconds(elapsed)]
        if left is not None and left > elapsed:
            parts.append(f"{_seconds(left - elapsed)} left")
        return Text("; ".join(parts))


def _seconds(seconds: float) -> str:
    """Without tenths, which would flicker."""
    return f"{seconds:.0f} s" if seconds < 59.5 else words.duration(seconds)


def _of(round: int, planned: int | None) -> str:
    return str(round) if planned is None else f"{round}/{planned}"


def _connected(absent: Sequence[str], total: int) -> str:
    found = f"{total - len(absent)} of {total} clients are connected"
    return f"{found}, not {_listed(absent)}" if absent else found


def _listed(names: Sequence[str]) -> str:
    """The first of some names, as they fit into a line."""
    some = ", ".join(words.shortened(name, 40) for name in names[:NAMED])
    return f"{some} and {len(names) - NAMED} more" if len(names) > NAMED else some


def _late(name: str, reason: str) -> str:
    return f"{name} left with its update in the sum ({reason[:REASON_WIDTH]})"


def _failure(name: str, reason: str) -> str:
    return f"{words.shortened(name, 60)} failed ({words.shortened(reason, REASON_WIDTH)})"
