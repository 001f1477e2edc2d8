"""What the worker processes do: clients' messages, evaluation, references."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Context

from fedtune.errors import JobError
from fedtune.flower.client_app import make_client_app
from fedtune.flower.grid import KIND, message_handler
from fedtune.flower.pool import Failed, ForkPool, InlinePool, Pool, Task
from fedtune.simulation.job import Job
from fedtune.train.torch_trainer import choose_device
from fedtune.train.trainer import Dataset, Evaluation
from fedtune.types import Float32Vector

# Rows per evaluation task: small enough to share out, and the same for any number of workers,
# so that a score does not depend on how many there are.
ROWS_PER_TASK = 256
COMMON_TEST = -1  # the set held by the server; clients' own sets are their places


def make_pool(job: Job, workers: int | None, wire: bool = False) -> Pool:
    """Workers for `job`: one per core by default; 0 runs everything in this process."""
    from fedtune.simulation.references import reference_handler

    handlers = {
        KIND: message_handler(
            make_client_app(_find_machine(job), disclose_errors=True), len(job.clients), wire
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


def evaluate(pool: Pool, job: Job, adapter: Float32Vector, place: int = COMMON_TEST) -> Evaluation:
    """Evaluate `adapter` on the common test set or on the own test set of the client in `place`.

    The rows are shared out over the workers; raises `JobError` if one of them fails.
    """
    data = _test_set(job, place)
    tasks = [
        Task(part, "evaluate", lambda p=part: _pack_evaluate(place, p, adapter))  # type: ignore[misc]
        for part in range(len(list(_parts(data))))
    ]
    answers = {}
    for part, result in pool.run(tasks):
        if isinstance(result, Failed):
            raise JobError(f"evaluation failed: {result.reason}")
        answers[part] = _unpack_evaluation(result)
    return merge(data, [answers[part] for part in range(len(tasks))], job)


@dataclass(frozen=True)
class PartEvaluation:
    """Loss and predictions of one part of a test set."""

    loss_sum: float
    predictions: np.ndarray[tuple[int], np.dtype[np.int64]]


def merge(data: Dataset, parts: list[PartEvaluation], job: Job) -> Evaluation:
    """The evaluation of a whole test set from its parts, in order."""
    labels = job.task.labels(data)
    predictions = np.full(len(labels), -1, np.int64)
    for rows, part in zip(_parts(data), parts, strict=True):
        if len(labels):
            predictions[rows] = part.predictions
    correct = int((predictions == labels).sum())
    loss_sum = sum(part.loss_sum for part in parts)
    return Evaluation(len(data), loss_sum, correct, predictions, labels)


def _find_machine(job: Job):  # type: ignore[no-untyped-def]  # see the return
    def find(context: Context):  # type: ignore[no-untyped-def]
        return job.machine(int(context.node_config["partition-id"]))

    return find


def _default_workers(job: Job) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // job.config.train.threads)


def _test_set(job: Job, place: int) -> Dataset:
    data = job.test if place == COMMON_TEST else job.clients[place].test
    if data is None:
        raise JobError("there is no such test set")
    return data


def _parts(data: Dataset) -> Iterator[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    order = np.argsort(data.lengths, kind="stable")
    for start in range(0, len(order), ROWS_PER_TASK):
        yield order[start : start + ROWS_PER_TASK]


def _pack_evaluate(place: int, part: int, adapter: Float32Vector) -> bytes:
    return json.dumps([place, part]).encode() + b"\n" + adapter.tobytes()


def _evaluate(job: Job, payload: bytes) -> bytes:
    header, _, vector = payload.partition(b"\n")
    place, part = json.loads(header)
    data = _test_set(job, place)
    rows = list(_parts(data))[part]
    result = job.trainer().evaluate(np.frombuffer(vector, np.float32).copy(), data.select(rows))
    return result.loss_sum.hex().encode() + b"\n" + result.predictions.tobytes()


def _unpack_evaluation(data: bytes) -> PartEvaluation:
    loss, _, predictions = data.partition(b"\n")
    return PartEvaluation(float.fromhex(loss.decode()), np.frombuffer(predictions, np.int64))
