"""What the worker processes do: clients' messages, evaluation, references."""

from __future__ import annotations

import json
import os
from functools import partial

import numpy as np
import torch
from flwr.app import Context
from numpy.typing import NDArray

from fedtune.errors import JobError
from fedtune.flower.client_app import make_client_app
from fedtune.flower.grid import KIND, message_handler
from fedtune.flower.pool import Failed, ForkPool, InlinePool, Pool, Task
from fedtune.resources import usable_cores
from fedtune.round.client import ClientMachine
from fedtune.simulation.job import Job
from fedtune.simulation.packing import pack_evaluation, unpack_evaluation
from fedtune.simulation.references import reference_handler
from fedtune.simulation.sites import Sites
from fedtune.train.torch_trainer import choose_device
from fedtune.train.trainer import Dataset, Evaluation
from fedtune.types import Float32Vector

# Rows per evaluation task: small enough to share out, and the same for any number of workers,
# so that a score does not depend on how many there are.
ROWS_PER_TASK = 256
COMMON_TEST = -1  # the set held by the server; clients' own sets are their places


def make_pool(
    job: Job, workers: int | None, wire: bool = False, sites: Sites | None = None
) -> Pool:
    """Workers for `job`: one per core by default; 0 runs everything in this process."""
    handlers = {
        KIND: message_handler(
            make_client_app(partial(_machine_of, job, sites), disclose_errors=True),
            len(job.clients),
            wire,
        ),
        "evaluate": lambda payload: _evaluate(job, payload),
        "reference": lambda payload: reference_handler(job, payload),
    }
    device = choose_device(job.config.train.device)

    def start(_nothing: bytes) -> bytes:
        torch.set_num_threads(job.config.train.threads)
        if device.type != "cpu":
            job.adapter.to(device)
        return b""

    if workers is None:
        # One process drives an accelerator; a CPU has one process per core.
        workers = _default_workers(job) if device.type == "cpu" else 1
    if workers == 0 or not hasattr(os, "fork"):
        start(b"")
        return InlinePool(handlers)
    return ForkPool(handlers, workers, start)


def evaluate(
    pool: Pool,
    job: Job,
    adapter: Float32Vector,
    place: int = COMMON_TEST,
    emulated: bool = False,
) -> Evaluation:
    """Evaluate `adapter` on the common test set or on the own test set of the client in `place`.

    It is a whole one, float32 `[job.adapter.manifest.size]`. With `emulated`, not in the whole base
    model but in what clients train against. The rows are shared out over the workers; raises
    `JobError` if one of them fails.
    """
    data = _test_set(job, place)
    tasks = [
        Task(part, "evaluate", partial(_pack_request, place, part, emulated, adapter))
        for part in range(len(_parts(data)))
    ]
    answers = {}
    for part, result in pool.run(tasks):
        if isinstance(result, Failed):
            raise JobError(f"evaluation failed: {result.reason}")
        answers[part] = unpack_evaluation(result)
    found = [answers[part] for part in range(len(tasks))]  # one order, for the same sums
    return Evaluation(
        sum(part.examples for part in found),
        sum(part.loss_sum for part in found),
        sum(part.correct for part in found),
        np.concatenate([part.predictions for part in found]),
        np.concatenate([part.labels for part in found]),
    )


def _machine_of(job: Job, sites: Sites | None, context: Context) -> ClientMachine:
    place = int(context.node_config["partition-id"])
    return job.machine(place, sites.membership(job.clients[place].name) if sites else None)


def _default_workers(job: Job) -> int:
    return max(1, usable_cores() // job.config.train.threads)


def _test_set(job: Job, place: int) -> Dataset:
    data = job.test if place == COMMON_TEST else job.clients[place].test
    if data is None:
        raise JobError("there is no such test set")
    return data


def _parts(data: Dataset) -> list[NDArray[np.int64]]:
    order = np.argsort(data.lengths, kind="stable")
    return [order[start : start + ROWS_PER_TASK] for start in range(0, len(order), ROWS_PER_TASK)]


def _pack_request(place: int, part: int, emulated: bool, adapter: Float32Vector) -> bytes:
    return json.dumps([place, part, emulated]).encode() + b"\n" + adapter.tobytes()


def _evaluate(job: Job, payload: bytes) -> bytes:
    header, _, vector = payload.partition(b"\n")
    place, part, emulated = json.loads(header)
    data = _test_set(job, place)
    rows = data.select(_parts(data)[part])
    adapter = np.frombuffer(vector, np.float32).copy()
    trainer = job.torch_trainer() if emulated else job.tester()
    return pack_evaluation(trainer.evaluate(adapter, rows))
