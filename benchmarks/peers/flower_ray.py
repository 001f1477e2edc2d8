"""Flower's own simulation engine (Ray), with two actors of one CPU.

`flower-usual`: as Flower's fine-tuning examples are written: each call loads tokenizer and base
model and pads to the maximum. `flower-usual-dynpad`: the same, padded per batch.
`flower-careful`: model and tokens are kept in the actor, padded per batch.
"""

from __future__ import annotations

import os

os.environ.update(
    FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", RAY_USAGE_STATS_ENABLED="0"
)

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn

from peers.job import CORES, MAX_TOKENS, Job, Stopwatch, read_job
from peers.learning import (
    Corpus,
    get_state,
    initial_state,
    load_corpus,
    load_model,
    load_tokenizer,
    set_state,
    train,
)

client_app = ClientApp()


@functools.cache
def _job(folder: str) -> Job:
    return read_job(Path(folder))


@functools.cache
def _names(folder: str) -> list[str]:
    return _job(folder).client_names()


@functools.cache
def _kept_tokenizer(folder: str) -> Any:
    return load_tokenizer(_job(folder))


@functools.cache
def _kept_model(folder: str) -> nn.Module:
    return load_model(_job(folder))


@functools.cache
def _kept_corpus(folder: str, client: str) -> Corpus:
    return load_corpus(_job(folder), client, _kept_tokenizer(folder))


@client_app.train()
def train_client(message: Message, context: Context) -> Message:
    """One client in one round."""
    config = message.content["config"]
    folder = str(config["folder"])
    job, client = _job(folder), _names(folder)[int(context.node_config["partition-id"])]
    torch.set_num_threads(1)
    if config["keep"]:
        corpus, model = _kept_corpus(folder, client), _kept_model(folder)
    else:
        corpus, model = load_corpus(job, client, load_tokenizer(job)), load_model(job)
    set_state(model, message.content["arrays"].to_torch_state_dict())
    plan = job.batches(int(config["server-round"]), client, corpus.lengths)
    train(model, (corpus.batch(rows, int(config["width"]) or None) for rows in plan), job.lr)
    content = {
        "arrays": ArrayRecord(get_state(model)),
        "metrics": MetricRecord({"num-examples": len(corpus)}),
    }
    return Message(RecordDict(content), reply_to=message)


class TimedFedAvg(FedAvg):
    """Flower's FedAvg that marks the rounds and ends the run if a client failed."""

    def __init__(self, stopwatch: Stopwatch, **settings: Any) -> None:
        super().__init__(**settings)
        self._stopwatch = stopwatch

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Round 1 begins here."""
        if server_round == 1:
            self._stopwatch.start()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """A round ends here."""
        replies = list(replies)
        failed = [reply.error for reply in replies if reply.has_error()]
        if failed:
            raise RuntimeError(f"{len(failed)} clients failed: {failed[0]}")
        aggregate = super().aggregate_train(server_round, replies)
        self._stopwatch.lap()
        return aggregate


def run_flower(job: Job, out: Path, path: str) -> None:
    """All rounds."""
    stopwatch = Stopwatch()
    server_app = ServerApp()
    config = {
        "folder": str(job.folder),
        "keep": path == "flower-careful",
        "width": MAX_TOKENS if path == "flower-usual" else 0,
    }

    @server_app.main()
    def serve(grid: Grid, _context: Context) -> None:
        strategy = TimedFedAvg(
            stopwatch,
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=job.clients,
            min_available_nodes=job.clients,
        )
        result = strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(initial_state(job)),
            num_rounds=job.rounds,
            train_config=ConfigRecord(config),
        )
        stopwatch.finish(out, result.arrays.to_torch_state_dict())

    run_simulation(
        server_app,
        client_app,
        num_supernodes=job.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": CORES, "include_dashboard": False},
        },
    )
