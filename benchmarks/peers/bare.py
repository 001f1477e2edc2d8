"""No framework: clients one after another, in one process of two threads or two of one thread."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peers.job import CORES, Job, Stopwatch
from peers.learning import (
    Corpus,
    State,
    get_state,
    initial_state,
    load_corpus,
    load_model,
    load_tokenizer,
    set_state,
    train,
)

WeightedSum = tuple[State, int]


class Loop:
    """Trains clients on a resident model; in two processes each takes the next client's number."""

    def __init__(self, job: Job, model: nn.Module, corpora: dict[str, Corpus], place: Any) -> None:
        self.job = job
        self.model = model
        self.corpora = corpora
        self.place = place  # a shared counter

    def round(self, number: int, state: State) -> WeightedSum:
        """Sum of example-weighted states, and of the weights, over the clients trained here."""
        total, weight = {name: torch.zeros_like(t) for name, t in state.items()}, 0
        for client in self._next_clients():
            corpus = self.corpora[client]
            set_state(self.model, state)
            plan = self.job.batches(number, client, corpus.lengths)
            train(self.model, (corpus.batch(rows) for rows in plan), self.job.lr)
            for name, tensor in get_state(self.model).items():
                total[name] += len(corpus) * tensor
            weight += len(corpus)
        return total, weight

    def serve(self, pipe: Connection) -> None:
        """The second process: a share of each round that is asked for."""
        while request := pipe.recv():
            number, arrays = request
            total, weight = self.round(number, {n: torch.from_numpy(a) for n, a in arrays.items()})
            pipe.send(({name: t.numpy() for name, t in total.items()}, weight))

    def _next_clients(self) -> Iterator[str]:
        names = list(self.corpora)
        while True:
            with self.place.get_lock():
                place = self.place.value
                self.place.value += 1
            if place >= len(names):
                return
            yield names[place]


def run_bare(job: Job, out: Path, processes: int) -> None:
    """All rounds."""
    stopwatch = Stopwatch()
    torch.set_num_threads(CORES // processes)
    tokenizer = load_tokenizer(job)
    corpora = {name: load_corpus(job, name, tokenizer) for name in job.client_names()}
    state = initial_state(job)
    fork = multiprocessing.get_context("fork")
    loop = Loop(job, load_model(job), corpora, fork.Value("l", 0))
    pipes = []
    for _ in range(processes - 1):
        here, there = fork.Pipe()
        fork.Process(target=loop.serve, args=(there,), daemon=True).start()
        pipes.append(here)
    stopwatch.start()
    for number in range(1, job.rounds + 1):
        loop.place.value = 0
        for pipe in pipes:
            pipe.send((number, {name: t.numpy() for name, t in state.items()}))
        total, weight = loop.round(number, state)
        for pipe in pipes:
            others, others_weight = pipe.recv()
            weight += others_weight
            for name, array in others.items():
                total[name] += torch.from_numpy(array)
        state = {name: t / weight for name, t in total.items()}
        stopwatch.lap()
    for pipe in pipes:
        pipe.send(None)
    stopwatch.finish(out, state)
