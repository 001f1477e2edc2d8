"""Progress and the final tables, as a person reads them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from report_samples import sample_rounds, sample_summary
from rich.console import Console

from fedtune.records import Summary
from fedtune.report.progress import LiveProgress, PlainProgress, Progress, make_progress
from fedtune.report.tables import print_summary


class Terminal(io.StringIO):
    """A stream that says it is a terminal and remembers whether it was flushed."""

    flushes = 0

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        self.flushes += 1


def play(progress: Progress, quiet_rounds: bool = False) -> None:
    """A run of ten rounds."""
    progress.started(["icd10 with 8 hospitals"], 10)
    for record in sample_rounds():
        for left in range(8, -1, -1):
            names = [f"hospital-{place}" for place in range(left)]
            progress.round_running(record.round, "train", names, 8)
        progress.round_done(record, 15.4 * (10 - record.round))
    progress.finished()
    progress.finished()


def test_plain_progress_prints_exactly_one_line_per_round() -> None:
    stream = io.StringIO()
    play(PlainProgress(stream))
    title, *lines = stream.getvalue().splitlines()
    assert title == "icd10 with 8 hospitals"
    assert [line.split(":")[0] for line in lines] == [f"round {n}/10" for n in range(1, 11)]
    assert lines[0] == (
        "round 1/10: train loss 2.320, loss 2.241, accuracy 41.2 %, up 3.2 MB, down 3.2 MB, "
        "time 15 s, left 2 min 19 s"
    )
    assert "hospital-3 failed (out of memory)" in lines[3]
    assert "warning" not in "".join(lines[:3] + lines[4:])


def test_plain_progress_omits_what_was_not_measured_and_flushes() -> None:
    stream = Terminal()
    progress = PlainProgress(stream)
    record = replace(sample_rounds()[0], train_loss=None, loss=None, accuracy=None)
    progress.round_done(record, None)
    assert stream.getvalue() == "round 1: up 3.2 MB, down 3.2 MB, time 15 s\n"
    assert stream.flushes == 1


def test_plain_progress_says_who_is_not_connected() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream)
    progress.connected(["ward-2", "ward-7"], 8)
    progress.connected([], 8)
    assert stream.getvalue().splitlines() == [
        "6 of 8 clients are connected, not ward-2, ward-7",
        "8 of 8 clients are connected",
    ]


def test_names_and_reasons_cannot_break_the_line() -> None:
    stream = io.StringIO()
    record = replace(sample_rounds()[0], failed={"evil\x1b[2J": "Traceback\n  File\nboom" * 99})
    PlainProgress(stream).round_done(record, None)
    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue()


def test_quiet_keeps_failures_and_notes() -> None:
    stream = Terminal()
    progress = make_progress(stream, quiet=True)
    play(progress)
    progress.note("one client has no label 3")
    assert stream.getvalue().splitlines() == [
        "warning: round 4: hospital-3 failed (out of memory)",
        "note: one client has no label 3",
    ]


@pytest.mark.parametrize(
    ("stream", "term", "kind"),
    [
        (Terminal(), "xterm", LiveProgress),
        (Terminal(), "dumb", PlainProgress),
        (io.StringIO(), "xterm", PlainProgress),
    ],
)
def test_only_terminals_are_animated(
    stream: io.StringIO, term: str, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert type(make_progress(stream)) is kind


def test_default_stream_is_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    play(make_progress())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "round 10/10" in captured.err


def test_live_progress_keeps_a_row_per_round(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    stream = io.StringIO()  # not a terminal: rich leaves the animation out, the rows stay
    progress = LiveProgress(stream)
    play(progress)
    progress.note("[red]not markup[/red]")
    lines = stream.getvalue().splitlines()
    rows = [line for line in lines if "/10 " in line]
    assert [row.split("/")[0].strip() for row in rows] == [str(n) for n in range(1, 11)]
    assert max(map(len, rows)) <= 80
    assert " ".join(rows[9].split()) == "10/10 0.829 1.000 68.1 % 3.2 MB 3.2 MB 15 s 0.0 s"
    assert lines[lines.index(rows[3]) + 1] == "  warning: hospital-3 failed (out of memory)"
    assert lines[-1] == "note: [red]not markup[/red]"


def test_live_line_shows_the_running_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    monkeypatch.setenv("COLUMNS", "100")
    progress = LiveProgress(stream)
    progress.started(["title"], 10)
    progress.connected(["[red]"], 8)
    progress.round_running(2, "train", ["a", "b", "[red]", "c", "d"], 8)
    progress.round_running(2, "train", ["a", "b", "[red]", "c"], 8)
    progress.finished()  # draws the last state before it goes
    last = stream.getvalue().rpartition("round 2/10 training")[2]
    assert "4/8 clients; late: a, b, [red] (offline) and 1 more; 0 s" in last
    assert stream.getvalue().rindex("\x1b[?25h") > 0  # the cursor is back


def last_line(monkeypatch: pytest.MonkeyPatch, *told: Callable[[Progress], None]) -> str:
    """What the live line says in the end, without the bar and the codes of colours."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    progress = LiveProgress(stream)
    progress.started(["title"], 10)
    for tell in told:
        tell(progress)
    progress.finished()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|[━╸╺]", "", stream.getvalue())
    return " ".join(re.split(r"[\r\n]+", text.strip())[-1].split())


def test_nobody_is_late_before_most_have_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    few = last_line(monkeypatch, lambda p: p.round_running(1, "train", ["b", "c"], 3))
    most = last_line(monkeypatch, lambda p: p.round_running(1, "train", ["c"], 3))
    all_of_them = last_line(monkeypatch, lambda p: p.round_running(1, "train", [], 3))
    assert few == "round 1/10 training 1/3 clients; 0 s"
    assert most == "round 1/10 training 2/3 clients; late: c; 0 s"
    assert all_of_them == "round 1/10 training 3/3 clients; 0 s"


def test_live_line_says_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = last_line(monkeypatch, lambda p: p.waiting(0, 3), lambda p: p.waiting(2, 3))
    assert waiting == "waiting for clients 2/3 clients; 0 s"
    evaluating = last_line(
        monkeypatch,
        lambda p: p.round_running(1, "reveal", [], 3),
        lambda p: p.round_running(1, "evaluate", [], 0),
    )
    assert evaluating == "round 1/10 evaluating 0 s"
    # How long the whole run still takes is counted down from the estimate of the last round.
    second = last_line(
        monkeypatch,
        lambda p: p.round_done(sample_rounds()[0], 126.0),
        lambda p: p.round_running(2, "sign", ["a", "b", "c"], 3),
    )
    assert second == "round 2/10 signing 0/3 clients; 0 s; 2 min 6 s left"


def test_plain_progress_says_once_that_it_waits() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream)
    for number in (1, 2):
        progress.waiting(0, 3)
        progress.waiting(1, 3)
        progress.round_running(number, "train", [], 3)
    assert stream.getvalue().splitlines() == ["waiting for clients, 3 of 3 are missing"] * 2


def printed(summary: Summary, folder: Path) -> str:
    stream = io.StringIO()
    print_summary(summary, Console(file=stream, width=80, no_color=True), folder)
    return stream.getvalue()


def test_summary_shows_each_client_within_80_columns(tmp_path: Path) -> None:
    text = printed(sample_summary(), tmp_path)
    rows = [line.split() for line in text.splitlines() if line.startswith(" hospital-")]
    assert " ".join(rows[0]) == "hospital-1 371 27.0 % +41.1 67.5 % 50.0 % +17.5 0"
    assert [row[-1] for row in rows] == ["0", "0", "1", "0", "0", "0", "0", "0"]
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "72.5 %" in text
    assert "warning: hospital-3" in text
    assert "\x1b" not in text


def test_summary_without_references_has_no_gain(tmp_path: Path) -> None:
    text = printed(sample_summary(references=False), tmp_path)
    assert "gain" not in text
    assert "centralized" not in text


def test_summary_names_what_exists_and_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    assert "continue" not in printed(sample_summary(), tmp_path)
    text = printed(replace(sample_summary(), status="interrupted", rounds=4), tmp_path)
    assert f"{tmp_path}/adapter" in text
    assert "report.html" not in text
    assert text.splitlines()[-1].endswith(f"fedtune simulate --resume {tmp_path}")


def test_summary_trusts_no_name_and_stays_short(tmp_path: Path) -> None:
    summary = sample_summary(100)
    evil = replace(summary.per_client[0], name="[red]\x1b[2J", examples=10_000)
    text = printed(replace(summary, per_client=(evil, *summary.per_client[1:])), tmp_path)
    assert "[red]�[2J" in text
    assert "60 more" in text
    assert text.count("hospital-") <= 45
