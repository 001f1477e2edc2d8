"""What a person must compare a federation with, on the same budget of sample-steps.

Centralized (all data in one place) is the ceiling; each client alone is the floor; the
untouched base with a linear head says what adapting it is worth. A sample-step is one example
in one optimizer step. All use one optimizer run with the learning rate falling over it, and
plain cross-entropy, as somebody without a federation would.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn import functional

from fedtune.config import Config
from fedtune.errors import ConfigError, JobError
from fedtune.flower.pool import Failed, Pool, Task
from fedtune.simulation.job import Job, all_training_rows
from fedtune.simulation.packing import pack_evaluation, unpack_evaluation
from fedtune.train.batches import client_rng, dropout_seed, learning_rate, plan_batches
from fedtune.train.texts import TokenizedTexts
from fedtune.train.trainer import Dataset, Evaluation, LocalPlan
from fedtune.types import Float32Vector

# A linear head alone has a convex loss and bears, and needs, a larger step.
HEAD_LR_FACTOR = 10
# One machine with all data uses larger batches, at the same number of sample-steps.
CENTRAL_BATCH_FACTOR = 4


@dataclass(frozen=True)
class ReferenceResult:
    """One reference model's evaluation on the test set, and what it cost."""

    evaluation: Evaluation
    seconds: float
    sample_steps: int


def check_references(config: Config, wanted: bool) -> None:
    """Raise `ConfigError` if references are wanted that cannot be trained alike."""
    if wanted and config.train.method == "forward-only":
        raise ConfigError(
            "--references are trained with gradients, for which the train.lr of train.method = "
            "forward-only is not meant; run them with train.method = backprop"
        )


def run_references(
    pool: Pool, job: Job, initial: Float32Vector, progress: Callable[[int, int], None]
) -> dict[str, ReferenceResult]:
    """`centralized`, `alone:PLACE` for each client that can be tested, for texts `linear-head`.

    They are trained in the workers; raises `JobError` if one of them fails.
    """
    # The longest first: it decides when all are done.
    testable = [p for p, client in enumerate(job.clients) if job.test or client.test]
    names = ["centralized", *(f"alone:{place}" for place in testable)]
    if job.has_classifier:
        names.append("linear-head")

    def payload(name: str) -> bytes:
        return name.encode() + b"\n" + initial.tobytes()

    tasks = [Task(place, "reference", partial(payload, name)) for place, name in enumerate(names)]
    results: dict[str, ReferenceResult] = {}
    if not testable:
        raise JobError("there is no test set to compare on")
    progress(0, len(tasks))
    for key, result in pool.run(tasks):
        if isinstance(result, Failed):
            raise JobError(f"reference {names[key]}: {result.reason}")
        results[names[key]] = _unpack(result)
        progress(len(results), len(tasks))
    return results


def reference_handler(job: Job, payload: bytes) -> bytes:
    """In a worker: train and evaluate one reference."""
    name, _, vector = payload.partition(b"\n")
    initial = np.frombuffer(vector, np.float32).copy()
    kind, _, place = name.decode().partition(":")
    if kind == "alone":
        result = _train_alone(job, initial, int(place))
    elif kind == "centralized":
        result = train_centralized(job, initial, sample_steps(job, _cohort(job)))
    else:
        result = _train_linear_head(job)
    return _pack(result)


def sample_steps(job: Job, clients: int) -> int:
    """Examples times optimizer steps that `clients` clients take in the whole federation."""
    config = job.config
    return clients * config.rounds.count * config.train.steps * config.train.batch_size


def _cohort(job: Job) -> int:
    return min(job.config.rounds.clients_per_round or len(job.clients), len(job.clients))


def train_centralized(job: Job, initial: Float32Vector, budget: int) -> ReferenceResult:
    """Train on all clients' rows in one place, `budget` sample-steps from `initial`."""
    data = all_training_rows(job.clients)
    batch = job.config.train.batch_size * CENTRAL_BATCH_FACTOR
    return _train(job, initial, data, budget, batch, _evaluation_set(job, None))


def _train_alone(job: Job, initial: Float32Vector, place: int) -> ReferenceResult:
    # With a cohort drawn each round, a client trains in its share of the rounds.
    budget = sample_steps(job, _cohort(job)) // len(job.clients)
    data = job.clients[place].train
    batch = job.config.train.batch_size
    return _train(job, initial, data, budget, batch, _evaluation_set(job, place))


def _evaluation_set(job: Job, place: int | None) -> Dataset:
    if job.test is not None:
        return job.test
    if place is not None:
        own = job.clients[place].test
        if own is None:
            raise JobError(f"{job.clients[place].name} has no test set")
        return own
    first, *others = [client.test for client in job.clients if client.test is not None]
    return first.concatenate(others)


def _train(
    job: Job, initial: Float32Vector, data: Dataset, budget: int, batch_size: int, test: Dataset
) -> ReferenceResult:
    started = time.perf_counter()
    train = job.config.train
    batch_size = min(batch_size, len(data))
    steps = max(1, budget // batch_size)
    rates = (
        learning_rate(train.schedule, train.lr, train.final_lr_fraction, step, steps)
        for step in range(steps)
    )
    rng = client_rng(job.config.seed, 0, "reference")
    plan = LocalPlan(plan_batches(data.lengths, steps, batch_size, rng), rates, dropout_seed(rng))
    trainer = job.torch_trainer()
    result = trainer.train(initial, data, plan)
    evaluation = job.tester().evaluate(result.adapter, test)
    return ReferenceResult(evaluation, time.perf_counter() - started, steps * batch_size)


def _train_linear_head(job: Job) -> ReferenceResult:
    started = time.perf_counter()
    data, test = all_training_rows(job.clients), _evaluation_set(job, None)
    if not isinstance(data, TokenizedTexts) or not isinstance(test, TokenizedTexts):
        raise JobError("a linear head is a reference for texts only")
    trainer = job.torch_trainer()
    device = trainer.device
    features, test_features = (
        torch.from_numpy(trainer.features(rows)).to(device) for rows in (data, test)
    )
    labels, test_labels = (torch.from_numpy(rows.labels).to(device) for rows in (data, test))
    budget, batch = sample_steps(job, _cohort(job)), min(256, len(data))
    steps = max(1, budget // batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.config.seed)
        head = torch.nn.Linear(features.shape[1], len(job.labels)).to(device)
    lr = job.config.train.lr * HEAD_LR_FACTOR
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.0)
    rng = client_rng(job.config.seed, 0, "linear-head")
    for step, rows in enumerate(plan_batches(data.lengths, steps, batch, rng)):
        optimizer.param_groups[0]["lr"] = learning_rate("cosine", lr, 0.0, step, steps + 1)
        loss = functional.cross_entropy(head(features[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
    with torch.inference_mode():
        logits = head(test_features)
        loss_sum = float(functional.cross_entropy(logits, test_labels, reduction="sum"))
        predictions = logits.argmax(-1).cpu().numpy()
    correct = int((predictions == test.labels).sum())
    evaluation = Evaluation(len(test), loss_sum, correct, predictions, test.labels)
    return ReferenceResult(evaluation, time.perf_counter() - started, steps * batch)


def _pack(result: ReferenceResult) -> bytes:
    header = json.dumps([result.seconds, result.sample_steps])
    return header.encode() + b"\n" + pack_evaluation(result.evaluation)


def _unpack(data: bytes) -> ReferenceResult:
    header, _, evaluation = data.partition(b"\n")
    seconds, steps = json.loads(header)
    return ReferenceResult(unpack_evaluation(evaluation), seconds, steps)
