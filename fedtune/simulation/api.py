"""The Python API: `fedtune.simulate`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtune.adapter.lora import LoRA
from fedtune.config import Config, parse_config
from fedtune.data import ClientData, FederatedData, TextExamples
from fedtune.errors import ConfigError, DataError
from fedtune.records import RoundRecord, Summary
from fedtune.report.progress import make_progress
from fedtune.simulation.folder import RunFolder, check_new, free_path
from fedtune.simulation.job import Job, custom_job, text_job
from fedtune.simulation.run import Options, Outcome, Simulation, check_same_job, create_run


@dataclass(frozen=True)
class Client:
    """One client's rows.

    For a text classifier rows are `(text, label)` pairs, for a language model texts; for your own
    module anything that `torch.utils.data.default_collate` batches, such as `(inputs, target)`.
    """

    name: str
    train: Sequence[Any]
    test: Sequence[Any] | None = None


@dataclass(frozen=True)
class Run:
    """A finished simulation; everything is in the folder `path` too."""

    path: Path
    summary: Summary
    rounds: tuple[RoundRecord, ...]
    adapter: Mapping[str, NDArray[np.float32]]
    model: nn.Module

    @property
    def accuracy(self) -> float | None:
        """Accuracy after the last evaluated round, if the task has classes."""
        return self.summary.final.accuracy if self.summary.final else None


def simulate(
    base: str | nn.Module,
    clients: Sequence[Client],
    *,
    adapter: LoRA | None = None,
    test: Sequence[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    rounds: int = 10,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    on_round: Callable[[RoundRecord], None] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    references: bool = False,
    workers: int | None = None,
    quiet: bool = False,
) -> Run:
    """Fine-tune `base` over `clients` on this machine.

    `base` is a Hugging Face encoder (for `(text, label)` rows), a decoder (for texts, with
    ``settings={"base.task": "causal-lm"}``) or your own module, which is changed: it gets the
    adapter. `loss(module, batch)` gives the mean loss of a collated
    batch; by default cross-entropy of `(inputs, target)`. `test` are rows of a common test
    set. `settings` are configuration keys, as in ``{"train.lr": 1e-3, "train.steps": 50}``.
    `on_round` is called with the record of each committed round. With `resume`, a run that is
    in the folder `out` already is continued.

    Raises `ConfigError`, `DataError`, `BaseModelError` or `RunFolderError` for wrong input and
    `JobError` when the run fails; its folder then tells how far it came.
    """
    lora = adapter or LoRA()
    if not clients:
        raise DataError("simulate() needs at least one client")
    config = _config(base, lora, clients, rounds, seed, settings or {})
    if out is not None and not resume:
        check_new(Path(out))
    job = _job(config, base, lora, clients, test, loss)
    path = Path(out) if out is not None else free_path(Path("runs"), "simulation")
    again = resume and path.exists()
    with RunFolder.open(path) if again else create_run(job, path, references) as run:
        if again:
            check_same_job(job, run)
        progress = make_progress(sys.stderr, quiet)
        progress.started([f"{len(clients)} clients, {rounds} rounds"], rounds)
        for warning in job.warnings:
            progress.note(warning)
        options = Options(workers, references=references)
        outcome = Simulation(job, run, options, progress, on_round).execute()
    if outcome.error:
        raise outcome.error
    return _finished(job, outcome)


def _finished(job: Job, outcome: Outcome) -> Run:
    job.adapter.write(outcome.adapter)
    job.adapter.module.eval()
    tensors = job.adapter.manifest.split(outcome.adapter)
    return Run(outcome.path, outcome.summary, outcome.records, tensors, job.adapter.module)


def _config(
    base: str | nn.Module,
    lora: LoRA,
    clients: Sequence[Client],
    rounds: int,
    seed: int,
    settings: Mapping[str, Any],
) -> Config:
    import json

    own = {
        "base.path": base if isinstance(base, str) else f"module {type(base).__name__}",
        "adapter.rank": lora.rank,
        "adapter.alpha": lora.alpha,
        "adapter.dropout": lora.dropout,
        "adapter.targets": list(lora.targets),
        "data.source": "python",
        "data.clients": len(clients),
        "rounds.count": rounds,
        "seed": seed,
    }
    if clash := sorted(set(own) & set(settings)):
        raise ConfigError(f"settings: {', '.join(clash)} is given by an argument of simulate()")
    lines = [f"{key}={json.dumps(value)}" for key, value in {**own, **settings}.items()]
    return parse_config("", "simulate()", lines)


def _job(
    config: Config,
    base: str | nn.Module,
    lora: LoRA,
    clients: Sequence[Client],
    test: Sequence[Any] | None,
    loss: Callable[[nn.Module, Any], Tensor] | None,
) -> Job:
    names = [client.name for client in clients]
    if len(set(names)) < len(names):
        raise DataError("every client needs a name of its own")
    if empty := [client.name for client in clients if not len(client.train)]:
        raise DataError(f"no training rows at {', '.join(empty)}")
    if isinstance(base, nn.Module):
        rows = [(client.name, client.train, client.test) for client in clients]
        return custom_job(config, base, lora, rows, test, loss)
    if loss is not None or lora.also_train:
        raise ConfigError("loss and LoRA.also_train are for your own module, not for a base model")
    if config.base.task == "causal-lm":
        return text_job(config, _unlabelled(clients, test))
    return text_job(config, _texts(clients, test))


def _unlabelled(clients: Sequence[Client], test: Sequence[Any] | None) -> FederatedData:
    def examples(rows: Sequence[Any]) -> TextExamples:
        for text in rows:
            if not isinstance(text, str):
                raise DataError(f"a text must be a string, not {type(text).__name__}")
        return TextExamples(tuple(rows), np.zeros(len(rows), np.int64))

    return FederatedData(
        labels=(),
        clients=tuple(
            ClientData(c.name, examples(c.train), examples(c.test) if c.test else None)
            for c in clients
        ),
        test=examples(test) if test else None,
        validation=None,
        warnings=(),
        source=f"own texts of {len(clients)} clients",
    )


def _texts(clients: Sequence[Client], test: Sequence[Any] | None) -> FederatedData:
    parts = [part for client in clients for part in (client.train, client.test or [])]
    try:
        found = {str(label) for part in [*parts, test or []] for _, label in part}
    except (TypeError, ValueError) as error:
        raise DataError("rows for a text encoder must be (text, label) pairs") from error
    labels = tuple(sorted(found))
    index = {label: place for place, label in enumerate(labels)}

    def examples(rows: Sequence[Any]) -> TextExamples:
        if wrong := next((text for text, _ in rows if not isinstance(text, str)), None):
            raise DataError(f"a text must be a string, not {type(wrong).__name__}")
        numbers = np.array([index[str(label)] for _, label in rows], np.int64)
        return TextExamples(tuple(text for text, _ in rows), numbers)

    return FederatedData(
        labels=labels,
        clients=tuple(
            ClientData(c.name, examples(c.train), examples(c.test) if c.test else None)
            for c in clients
        ),
        test=examples(test) if test else None,
        validation=None,
        warnings=(),
        source=f"own texts of {len(clients)} clients, {len(labels)} labels",
    )
