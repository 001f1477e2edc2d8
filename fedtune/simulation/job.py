"""What is simulated: a trainer, its clients' data and the test set, in memory once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtune.adapter.lora import AttachedAdapter, LoRA, attach_lora, target_names
from fedtune.adapter.parts import Parts, parts_of, shared_manifest
from fedtune.base.causal import CausalBase
from fedtune.base.classifier import BaseModel
from fedtune.config import Config, Train
from fedtune.data import (
    FederatedData,
    PartitionSpec,
    TextExamples,
    label_counts,
    load_icd10,
    load_path,
)
from fedtune.errors import ConfigError, DataError
from fedtune.round.client import ClientMachine
from fedtune.round.local import record_privacy
from fedtune.round.membership import Membership
from fedtune.round.terms import make_quantizer, make_terms
from fedtune.train.channel import Metered
from fedtune.train.cut_forward import forward_trainer
from fedtune.train.directions import Directions
from fedtune.train.forward_only import directions_of
from fedtune.train.private import RecordPrivacy
from fedtune.train.task import (
    TASKS,
    CustomTask,
    Rows,
    Task,
    class_targets,
    tokenize,
)
from fedtune.train.texts import TokenizedTexts
from fedtune.train.torch_trainer import TorchSettings, TorchTrainer, choose_device
from fedtune.train.trainer import Dataset, Trainer
from fedtune.types import Float32Vector, Manifest
from fedtune.update import make_pipeline

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
class Shown:
    """A row of the common test set that the report shows; `image` is a PNG."""

    row: int
    question: str
    image: bytes


@dataclass(frozen=True)
class Job:
    """Everything that the worker processes share with their parent."""

    config: Config
    adapter: AttachedAdapter
    task: Task
    base_name: str
    base_digest: str
    adapter_words: str
    clients: tuple[JobClient, ...]
    test: Dataset | None
    labels: tuple[str, ...]
    data_words: str
    warnings: tuple[str, ...]
    has_classifier: bool = False  # whether it is an encoder with a linear head on top
    directions: Directions | None = None  # in which forward-only training moves the adapter
    parts: Parts | None = None  # of an adapter that is not shared as a whole
    shown: tuple[Shown, ...] = ()
    connector: Path | None = None  # a file that belongs to the adapter
    meter: Metered | None = None  # what passes the cut, where the base model is behind one
    cut_width: int = 0  # of an embedding there
    plugged: Task | None = None  # with the whole base model, where clients train on an emulator
    emulator: str | None = None  # its digest

    @property
    def manifest(self) -> Manifest:
        """Of what travels."""
        if self.parts:
            return self.parts.shared
        return self.directions.manifest if self.directions else self.adapter.manifest

    def initial(self) -> Float32Vector:
        """What the first round starts from, float32 `[manifest.size]`."""
        if self.directions:
            return np.zeros(self.directions.count, np.float32)
        return self.parts.shared_of(self.parts.start) if self.parts else self.adapter.read()

    def adapter_at(self, state: Float32Vector) -> Float32Vector:
        """The adapter that is meant by what travels, float32 `[adapter.manifest.size]`.

        Its private part, if it has one, is the one that every client began with.
        """
        if self.parts:
            return self.parts.join(state, self.parts.private_of(self.parts.start))
        return self.directions.expand(state) if self.directions else state

    def tester(self) -> TorchTrainer:
        """What evaluates: whole adapters, in the model that they are meant for."""
        return replace(self, task=self.plugged or self.task).torch_trainer()

    def torch_trainer(self, record_privacy: RecordPrivacy | None = None) -> TorchTrainer:
        """A trainer of adapters, not of directions, on the resident model."""
        settings = torch_settings(self.config.train, record_privacy)
        return TorchTrainer(self.adapter, self.task, self.base_digest, settings)

    def _trainer(self, model: TorchTrainer) -> Trainer:
        if self.directions is None:
            return model
        return forward_trainer(self.config, model, self.adapter, self.task, self.directions)

    def trainer_of(self, place: int) -> Trainer:
        """What the client in `place` trains with, which its number of examples may decide."""
        examples = len(self.clients[place].train)
        return self._trainer(self.torch_trainer(record_privacy(self.config, examples)))

    def machine(self, place: int, membership: Membership | None = None) -> ClientMachine:
        """The client in `place` as the round sees it."""
        client = self.clients[place]
        return ClientMachine(
            client.name,
            self.config,
            self.trainer_of(place),
            client.train,
            client.test,
            make_pipeline(self.config.update, self.config.values_sent(self.manifest.size)),
            membership,
            self.parts,
        )


def torch_settings(train: Train, record_privacy: RecordPrivacy | None = None) -> TorchSettings:
    """The trainer's part of the configuration."""
    return TorchSettings(
        train.optimizer, train.weight_decay, train.max_grad_norm, train.precision, record_privacy
    )


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
        label_column=config.label_column,
        labels=data.labels or None,
        min_size=data.min_examples,
    )


def text_job(config: Config, data: FederatedData | None = None) -> Job:
    """The task of the configuration over its texts; raises `UsageError`.

    `data` stands in for what `config.data` names.
    """
    torch.set_num_threads(1)  # a thread pool would not survive the fork; see `flower.pool`
    choose_device(config.train.device)  # a device that is not there is told before all else
    data = data or load_data(config)  # before the base model: wrong data is told sooner
    classes = config.base.task == "text-classification"
    if classes and len(data.labels) < 2:
        raise DataError(f"classification needs at least 2 labels; all rows have {data.labels[0]!r}")
    check_cohort(config, len(data.clients))
    model = TextModel(config, len(data.labels))
    check_privacy(config, shared_size(config, model.adapter), len(data.clients))
    clients = [
        JobClient(
            client.name,
            model.prepare(client.train),
            model.prepare(client.test) if client.test else None,
            label_counts(client.train, len(data.labels)) if classes else np.empty(0, np.int64),
        )
        for client in data.clients
    ]
    labels = data.labels if classes else ()
    return job_of_model(config, model, clients, data.test, labels, data.source, data.warnings)


def job_of_model(
    config: Config,
    model: TextModel,
    clients: Sequence[JobClient],
    test: TextExamples | None,
    labels: tuple[str, ...],
    data_words: str,
    warnings: tuple[str, ...] = (),
) -> Job:
    """A task over texts with a model that is loaded, by clients whose rows are prepared."""
    targets, head = ", ".join(target_names(model.adapter)), " + classifier" * bool(labels)
    return Job(
        config=config,
        adapter=model.adapter,
        task=model.task,
        base_name=config.base.path,
        base_digest=model.base.digest,
        adapter_words=f"LoRA r={config.adapter.rank} on {targets}{head}" + method_words(config),
        clients=tuple(clients),
        test=model.prepare(test) if test else None,
        labels=labels,
        data_words=data_words,
        warnings=warnings,
        has_classifier=bool(labels),
        directions=directions_for(config, model.adapter),
        parts=parts_for(config, model.adapter),
    )


def check_cohort(config: Config, clients: int) -> None:
    """Raise `ConfigError` if the rounds ask for more clients than there are."""
    for key, value in (
        ("rounds.clients-per-round", config.rounds.clients_per_round),
        ("rounds.min-clients", config.rounds.min_clients),
    ):
        if value is not None and value > clients:
            raise ConfigError(f"{key} = {value}, but there are {clients} clients; lower it")


def shared_size(config: Config, adapter: AttachedAdapter) -> int:
    """How many of the adapter's values are not private; raises `ConfigError` if none are."""
    return shared_manifest(config.adapter.private, adapter.manifest).size


def check_privacy(config: Config, size: int, clients: int) -> None:
    """Raise `ConfigError` if updates of so many clients cannot be protected.

    The adapter has `size` values that are not private.
    """
    size = config.values_sent(size)
    cohort = min(config.rounds.clients_per_round or clients, clients)
    terms = make_terms(config, clients)
    if config.secagg.enabled:
        try:
            terms.check(cohort)
        except ConfigError as error:
            raise ConfigError(
                f"{error}; or simulate without masks: --set secagg.enabled=false"
            ) from error
    if config.update.bits is not None:
        make_quantizer(config, size, cohort, terms).ring_bits(cohort)


class TextModel:
    """A model of texts in memory: base, adapter, tokenizer and task as the configuration says."""

    base: BaseModel | CausalBase
    task: Task

    def __init__(self, config: Config, labels: int) -> None:
        """Load it, a classifier for `labels` labels; raises `BaseModelError` or `ConfigError`."""
        # A language model must learn where a text ends; an encoder's tokenizer says so by itself.
        self.end_id: int | None = None
        module: nn.Module
        if config.base.task == "causal-lm":
            decoder = CausalBase(config.base.path, config.base.digest)
            self.base, module, self.end_id = decoder, decoder.module, decoder.end_id
        else:
            encoder = BaseModel(config.base.path, config.base.digest)
            self.base, module = encoder, encoder.classifier(labels, config.base.pooling)
        self.adapter = attach_lora(module, lora_of(config), config.seed)
        self.pad_id = int(self.base.tokenizer.pad_token_id or 0)
        self.task = TASKS[config.base.task](self.pad_id)
        self.max_length = min(config.base.max_length, self.base.max_tokens)

    def prepare(self, examples: TextExamples) -> TokenizedTexts:
        """The texts as the trainer takes them; raises `DataError`."""
        return tokenize(self.base.tokenizer, examples, self.max_length, self.end_id)


def lora_of(config: Config) -> LoRA:
    """The adapter of a model of texts: a classifier's new head is trained too."""
    found = config.adapter
    head = ("classifier",) if config.base.task == "text-classification" else ()
    return LoRA(found.rank, found.alpha, found.dropout, found.targets, also_train=head)


def custom_job(
    config: Config,
    module: nn.Module,
    lora: LoRA,
    clients: Sequence[tuple[str, Sequence[Any], Sequence[Any] | None]],
    test: Sequence[Any] | None,
    loss: Callable[[nn.Module, Any], Tensor] | None,
) -> Job:
    """A user's own module, rows and loss; `clients` are (name, training rows, test rows)."""
    torch.set_num_threads(1)
    choose_device(config.train.device)
    check_cohort(config, len(clients))
    base_digest = digest_module(module)
    attached = attach_lora(module, lora, config.seed)
    check_privacy(config, shared_size(config, attached), len(clients))
    task = CustomTask(loss)
    targets = [class_targets(rows) for _, rows, _ in clients]
    labels = 1 + max((int(found.max()) for found in targets if len(found)), default=-1)
    if any(len(found) and found.min() < 0 for found in targets):
        raise DataError("class targets must be 0 or more")
    words = [f"LoRA r={lora.rank} on {', '.join(target_names(attached))}", *lora.also_train]
    return Job(
        config=config,
        adapter=attached,
        task=task,
        base_name=type(module).__name__,
        base_digest=base_digest,
        adapter_words=" + ".join(words) + method_words(config),
        clients=tuple(
            JobClient(
                name,
                Rows(rows),
                Rows(own) if own is not None and len(own) else None,
                np.bincount(found, minlength=labels),
            )
            for (name, rows, own), found in zip(clients, targets, strict=True)
        ),
        test=Rows(test) if test is not None and len(test) else None,
        labels=tuple(str(label) for label in range(labels)),
        data_words=f"own data of {len(clients)} clients",
        warnings=(),
        directions=directions_for(config, attached),
        parts=parts_for(config, attached),
    )


def directions_for(config: Config, adapter: AttachedAdapter) -> Directions | None:
    """The directions of forward-only training; None with gradients."""
    if config.train.method == "backprop":
        return None
    return directions_of(config, adapter.manifest, adapter.read())


def parts_for(config: Config, adapter: AttachedAdapter) -> Parts | None:
    """What of an adapter that is still as the seed has it is shared; None: all."""
    return parts_of(config.adapter.private, adapter.manifest, adapter.read())


def method_words(config: Config) -> str:
    """What to add to an adapter's description if it is not shared whole, or has no gradients."""
    if config.adapter.private:
        return f", {', '.join(config.adapter.private)} private"
    if config.train.method == "backprop":
        return ""
    return f", forward-only in {config.train.directions:,} directions"


def digest_module(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(
            value.view(torch.uint8).numpy().tobytes() if value.ndim else str(value).encode()
        )
    return digest.hexdigest()


def all_training_rows(clients: Sequence[JobClient]) -> Dataset:
    """The training rows of all clients as one data set, for the centralized reference."""
    first, *others = (client.train for client in clients)
    return first.concatenate(others)
