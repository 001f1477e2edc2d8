"""`fedtune doctor --measure`: a few real training steps, in a process of their own.

Nothing is remembered and nothing is sent. The first step is on the longest rows, for the memory;
those that are timed are on rows as a round draws them.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import asdict, dataclass
from itertools import islice, repeat
from pathlib import Path

import numpy as np

from fedtune.errors import FedtuneError, JobError
from fedtune.resources import peak_memory

STEPS = 3
LONGEST_SECONDS = 600.0
_LARGEST_ANSWER = 10_000


@dataclass(frozen=True)
class Measured:
    """What training takes here."""

    seconds_per_step: float
    peak_bytes: int  # of the training process; 0: this system does not say


def measure(client: Path) -> Measured:
    """Train a little with the files that a client.toml names; raises `JobError`."""
    command = [sys.executable, "-m", __name__, str(client)]
    try:
        done = subprocess.run(  # noqa: S603  # this interpreter, this package
            command, stdout=subprocess.PIPE, timeout=LONGEST_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise JobError(f"{STEPS + 1} steps took more than {LONGEST_SECONDS:.0f} s") from error
    try:
        answer = json.loads(done.stdout[:_LARGEST_ANSWER])
        if "error" in answer:
            raise JobError(answer["error"])
        return Measured(**answer)
    except (ValueError, TypeError) as error:
        how = f"ended by signal {-done.returncode}" if done.returncode < 0 else "failed"
        raise JobError(f"training {how}; see above why, or lower train.batch-size") from error


def main() -> None:
    """What the process does."""
    logging.basicConfig(level=logging.WARNING)
    try:
        answer = asdict(_train(Path(sys.argv[1])))
    except FedtuneError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


def _train(path: Path) -> Measured:
    from fedtune.deploy.machine import load_training
    from fedtune.deploy.site_files import SiteFiles
    from fedtune.train.batches import plan_batches
    from fedtune.train.trainer import LocalPlan

    files = SiteFiles.read(path)
    train = files.federation.train
    site = load_training(files)
    trainer, rows = site.trainer, site.train
    adapter = np.zeros(trainer.manifest.size, np.float32)
    longest = np.argsort(-rows.lengths, kind="stable")[: train.batch_size]
    trainer.train(adapter, rows, LocalPlan(iter([longest]), repeat(0.0, 1), 0, train.batch_size))
    steps = min(STEPS, train.steps)
    batches = plan_batches(rows.lengths, train.steps, train.batch_size, np.random.default_rng(0))
    plan = LocalPlan(islice(batches, steps), repeat(0.0, steps), 0, train.batch_size)
    seconds = trainer.train(adapter, rows, plan).seconds
    return Measured(seconds / steps, peak_memory())


if __name__ == "__main__":
    main()
