"""The rounds as TensorBoard scalars, without torch and without TensorFlow."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedtune.files import write_atomic
from fedtune.records import RoundRecord

_PREFIX = "events.out.tfevents."


def write_events(folder: Path, rounds: Sequence[RoundRecord]) -> Path:
    """Make `folder` hold exactly `rounds`, whatever it held before; the new file's path.

    The file appears whole under a new, later name and then the older ones go; no reader ever
    finds half a file or none. TensorBoard tells files by name: opened on the folder with its
    default data server, it follows to the new file, which it would not if an old name were
    replaced. (With `--load_fast=false` it shows the new rounds after a restart.)
    """
    # RecordWriter and the protos, not EventFileWriter: that one imports TensorFlow where there
    # is one, and writes from a thread of its own.
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    # Records hold durations only; ending "now" makes TensorBoard's relative time axis right.
    clock = time.time() - sum(_seconds(record) for record in rounds)
    writer.write(Event(wall_time=clock, file_version="brain.Event:2").SerializeToString())
    # "Started again at step 0": readers forget what they read from an older file, also when a
    # crash below left one behind.
    start = SessionLog(status=SessionLog.START)
    writer.write(Event(wall_time=clock, step=0, session_log=start).SerializeToString())
    for record in rounds:
        clock += _seconds(record)
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in _scalars(record)]
        event = Event(wall_time=clock, step=record.round, summary=Summary(value=values))
        writer.write(event.SerializeToString())

    folder.mkdir(parents=True, exist_ok=True)
    older = list(folder.glob(_PREFIX + "*"))
    path = folder / f"{_PREFIX}{time.time_ns()}"
    write_atomic(path, buffer.getvalue())
    for file in older:
        if file != path:
            file.unlink(missing_ok=True)
    return path


def _scalars(record: RoundRecord) -> Iterator[tuple[str, float]]:
    scalars = {
        "train/loss": record.train_loss,
        "eval/loss": record.loss,
        "eval/accuracy": record.accuracy,
        "bytes/up": record.bytes_up,
        "bytes/down": record.bytes_down,
        "seconds": record.seconds,
    }
    return ((tag, value) for tag, value in scalars.items() if value is not None)


def _seconds(record: RoundRecord) -> float:
    return record.seconds if math.isfinite(record.seconds) else 0.0
