"""The job that every path runs, and what is measured of a run; cheap to import.

A job folder holds `job.json`, `base/` (the base model without dropout), `initial.safetensors`
(the adapter before round 1), `clients/NAME/train.jsonl`, and `federation.toml` for fedtune.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.train.batches import client_rng, plan_batches

SPAWNED = "FEDTUNE_BENCHMARK_SPAWNED"  # environment: when the process was asked for
CORES = 2  # threads, processes or actors of every path
MAX_TOKENS = 64
RANK, ALPHA, TARGETS = 8, 16, ("query", "value")


@dataclass(frozen=True)
class Job:
    """Clients train `steps` batches in each of `rounds`; they hold `rows` texts on average."""

    folder: Path
    clients: int
    steps: int
    rounds: int
    rows: int
    clients_per_round: int | None = None  # only fedtune draws cohorts; None: everybody
    batch_size: int = 8
    lr: float = 2e-3
    seed: int = 0
    labels: int = 0  # known once the data is written

    @property
    def base(self) -> Path:
        """The base model as a Hugging Face folder."""
        return self.folder / "base"

    @property
    def initial(self) -> Path:
        """The adapter before round 1, in peft's names."""
        return self.folder / "initial.safetensors"

    @property
    def data(self) -> Path:
        """One folder per client."""
        return self.folder / "clients"

    @property
    def federation(self) -> Path:
        """The job as fedtune's configuration."""
        return self.folder / "federation.toml"

    def client_names(self) -> list[str]:
        """Everybody, in order; names decide the batches."""
        return sorted(folder.name for folder in self.data.iterdir())

    def rows_of(self, client: str) -> tuple[list[str], list[int]]:
        """Texts and labels of one client."""
        with (self.data / client / "train.jsonl").open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        return [row["text"] for row in rows], [int(row["label"]) for row in rows]

    def batches(
        self, round_number: int, client: str, lengths: NDArray[np.int64]
    ) -> Iterator[NDArray[np.int64]]:
        """Row indices of each step, as fedtune draws them; `lengths` are tokens per text."""
        rng = client_rng(self.seed, round_number, client)
        return plan_batches(lengths, self.steps, self.batch_size, rng)


def write_job(job: Job) -> None:
    """Put `job.json` in the job's folder."""
    values = {**asdict(job), "folder": ""}
    (job.folder / "job.json").write_text(json.dumps(values))


def read_job(folder: Path) -> Job:
    """The job in a folder."""
    values = json.loads((folder / "job.json").read_text())
    return Job(**{**values, "folder": folder.resolve()})


class Stopwatch:
    """`start` when round 1 may begin, `lap` when a round's adapter is there, then `finish`."""

    def __init__(self) -> None:
        self._spawned = float(os.environ.get(SPAWNED) or time.time())
        self._marks: list[float] = []

    def start(self) -> None:
        """Everything that is needed is loaded."""
        self._marks = [time.time()]

    def lap(self) -> None:
        """One round is over."""
        self._marks.append(time.time())

    def finish(self, out: Path, adapter: Mapping[str, Any]) -> None:
        """Write the times and the final adapter (tensors by peft's names)."""
        from safetensors.torch import save_file

        start, *ends = self._marks
        save_file(
            {name: t.contiguous() for name, t in adapter.items()}, out / "adapter.safetensors"
        )
        rounds = np.diff([start, *ends]).tolist()
        times = {"startup_s": start - self._spawned, "rounds_s": rounds}
        (out / "times.json").write_text(json.dumps(times))
