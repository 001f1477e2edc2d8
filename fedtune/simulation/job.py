"""What is simulated: a trainer, its clients' data and the test set, in memory once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedtune.adapter.lora import AttachedAdapter, LoRA, attach_lora, target_names
from fedtune.config import Config, Train
from fedtune.data import FederatedData, PartitionSpec, TextExamples, load_icd10, load_path
from fedtune.round.client import ClientMachine
from fedtune.round.federation import make_pipeline
from fedtune.train.task import Task, TextClassification, TokenizedTexts, tokenize
from fedtune.train.torch_trainer import TorchSettings, TorchTrainer
from fedtune.train.trainer import Dataset

PACKAGED_DATA = "icd10"
DEFAULT_CLIENTS = 8


@dataclass(frozen=True)
class JobClient:
    """One simulated client; `label_counts` is int64 `[labels]`, empty without classes."""

    name: str
    train: Dataset
    test: Dataset | None
    label_counts: NDArray[np.int64]


@dataclass(frozen=True)
class Job:
    """Everything that the worker processes share with their parent."""

    config: Config
    adapter: AttachedAdapter
    task: Task
    plain_task: Task  # the task as somebody without a federation would train it
    base_name: str
    base_digest: str
    adapter_words: str
    clients: tuple[JobClient, ...]
    test: Dataset | None
    labels: tuple[str, ...]
    data_words: str
    warnings: tuple[str, ...]
    base_folder: Path | None = None

    def trainer(self, plain: bool = False) -> TorchTrainer:
        """A trainer on the resident model."""
        task = self.plain_task if plain else self.task
        return TorchTrainer(self.adapter, task, self.base_digest, torch_settings(self.config.train))

    def machine(self, place: int) -> ClientMachine:
        """The client in `place` as the round sees it."""
        client = self.clients[place]
        pipeline = make_pipeline(self.config.update, self.adapter.manifest.size)
        return ClientMachine(
            client.name, self.config, self.trainer(), client.train, client.test, pipeline
        )


def torch_settings(train: Train) -> TorchSettings:
    """The trainer's part of the configuration."""
    return TorchSettings(train.optimizer, train.weight_decay, train.max_grad_norm, train.precision)


def load_data(config: Config) -> FederatedData:
    """The data that the configuration names; raises `DataError` or `ConfigError`."""
    data = config.data
    spec = PartitionSpec.parse(data.partition) if data.partition else None
    if data.source == PACKAGED_DATA:
        return load_icd10(
            partition=spec or PartitionSpec.parse("iid"),
            clients=data.clients or DEFAULT_CLIENTS,
            seed=config.seed,
            min_size=data.min_examples,
        )
    return load_path(
        Path(data.source).expanduser(),
        partition=spec,
        clients=data.clients,
        seed=config.seed,
        test_fraction=data.test_fraction,
        text_column=data.text_column,
        label_column=data.label_column,
        labels=data.labels or None,
        min_size=data.min_examples,
    )


def text_job(config: Config) -> Job:
    """Text classification as the configuration describes it; raises `UsageError`."""
    # Importing transformers takes seconds; wrong data is found before.
    data = load_data(config)
    from fedtune.base.classifier import BaseModel

    torch.set_num_threads(1)  # a thread pool would not survive the fork; see `flower.pool`
    base = BaseModel(config.base.path)
    labels = len(data.labels)
    settings = config.adapter
    lora = LoRA(
        settings.rank,
        settings.alpha,
        settings.dropout,
        settings.targets,
        also_train=("classifier",),
    )
    attached = attach_lora(base.classifier(labels, config.base.pooling), lora, config.seed)
    pad_id = base.tokenizer.pad_token_id
    adjusted = config.train.loss == "logit-adjusted"
    max_length = min(config.base.max_length, base.max_tokens)

    def prepare(examples: TextExamples) -> TokenizedTexts:
        return tokenize(base.tokenizer, examples, max_length)

    return Job(
        config=config,
        adapter=attached,
        task=TextClassification(labels, pad_id or 0, adjusted),
        plain_task=TextClassification(labels, pad_id or 0),
        base_name=config.base.path,
        base_digest=base.digest,
        adapter_words=f"LoRA r={lora.rank} on {', '.join(target_names(attached))} + classifier",
        clients=tuple(
            JobClient(
                client.name,
                prepare(client.train),
                prepare(client.test) if client.test and len(client.test) else None,
                np.bincount(client.train.labels, minlength=labels),
            )
            for client in data.clients
        ),
        test=prepare(data.test) if data.test and len(data.test) else None,
        labels=data.labels,
        data_words=data.source,
        warnings=data.warnings,
        base_folder=base.folder,
    )


def all_training_rows(clients: Sequence[JobClient]) -> Dataset:
    """The training rows of all clients as one data set, for the centralized reference."""
    first, *others = (client.train for client in clients)
    return first.concatenate(others)
