"""Events are read back by TensorBoard's own reader."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from report_samples import sample_rounds
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedtune.report.tensorboard import write_events


def read(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def scalars(accumulator: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


@pytest.mark.parametrize(
    ("tag", "field"),
    [
        ("train/loss", "train_loss"),
        ("eval/loss", "loss"),
        ("eval/accuracy", "accuracy"),
        ("bytes/up", "bytes_up"),
        ("bytes/down", "bytes_down"),
        ("seconds", "seconds"),
    ],
)
def test_values_are_those_of_the_records(tag: str, field: str, tmp_path: Path) -> None:
    rounds = sample_rounds()
    write_events(tmp_path / "tb", rounds)
    expected = [(r.round, pytest.approx(getattr(r, field))) for r in rounds]
    assert scalars(read(tmp_path / "tb"), tag) == expected


def test_rounds_without_evaluation_are_left_out(tmp_path: Path) -> None:
    first, second, third = sample_rounds(3)
    write_events(tmp_path, [first, replace(second, loss=None, accuracy=None), third])
    accumulator = read(tmp_path)
    assert [step for step, _ in scalars(accumulator, "eval/accuracy")] == [1, 3]
    assert [step for step, _ in scalars(accumulator, "train/loss")] == [1, 2, 3]


@pytest.mark.parametrize("crash", [False, True])
def test_rewriting_leaves_no_duplicates(
    crash: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_events(tmp_path, sample_rounds(6))
    # Resumed after round 3, with other numbers and fewer rounds so far.
    resumed = sample_rounds(3) + [replace(r, accuracy=0.9) for r in sample_rounds(5)[3:]]
    if crash:  # between writing the new file and deleting the old one
        monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    write_events(tmp_path, resumed)
    assert len(list(tmp_path.iterdir())) == (2 if crash else 1)
    expected = [(r.round, pytest.approx(r.accuracy)) for r in resumed]
    assert scalars(read(tmp_path), "eval/accuracy") == expected


def test_time_axis_shows_the_durations(tmp_path: Path) -> None:
    write_events(tmp_path, sample_rounds(3))
    times = [event.wall_time for event in read(tmp_path).Scalars("seconds")]
    assert times[2] - times[0] == pytest.approx(2 * 15.4, abs=0.01)


def test_a_failed_write_leaves_the_old_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_events(tmp_path, sample_rounds(2))

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_events(tmp_path, sample_rounds(3))
    assert list(tmp_path.iterdir()) == [path]


def test_neither_torch_nor_tensorflow_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from fedtune.report.tensorboard import write_events;"
        f"write_events(pathlib.Path({str(tmp_path)!r}), []);"
        "assert not {'torch', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
