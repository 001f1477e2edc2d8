"""What is simulated of questions about images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fedtune.config import Config
from fedtune.data import PartitionSpec
from fedtune.data.easy_vqa import load_easy_vqa
from fedtune.data.question_folder import load_question_folder
from fedtune.data.questions import FederatedQuestions, QuestionExamples
from fedtune.errors import ConfigError
from fedtune.simulation.job import (
    DEFAULT_CLIENTS,
    Job,
    JobClient,
    Shown,
    check_cohort,
    check_privacy,
    directions_for,
    method_words,
    parts_for,
    shared_size,
)
from fedtune.simulation.vision import VisionModel
from fedtune.train.torch_trainer import choose_device

PACKAGED_DATA = "easy-vqa"
SHOWN = 12  # questions in the report
_SHOWN_PIXELS = 96


def vision_job(config: Config) -> Job:
    """The task of the configuration over its questions; raises `UsageError`."""
    torch.set_num_threads(1)  # a thread pool would not survive the fork; see `flower.pool`
    if choose_device(config.train.device).type != "cpu" and config.train.device != "auto":
        kind = config.adapter.kind
        raise ConfigError(f"adapter.kind = {kind} trains on the CPU; set train.device = cpu")
    data = load_questions(config)
    check_cohort(config, len(data.clients))
    model = VisionModel(config, data.answers, data.public, data.public_questions)
    check_privacy(config, shared_size(config, model.adapter), len(data.clients))
    clients = [
        JobClient(
            client.name,
            model.prepare(client.train),
            None,
            np.bincount(client.train.labels, minlength=len(data.answers)),
        )
        for client in data.clients
    ]
    test, words = data.test, data.source
    return job_of_vision(config, model, clients, test, data.answers, words, data.warnings)


def job_of_vision(
    config: Config,
    model: VisionModel,
    clients: Sequence[JobClient],
    test: QuestionExamples | None,
    answers: tuple[str, ...],
    data_words: str,
    warnings: tuple[str, ...] = (),
) -> Job:
    """A task over questions with a model that is loaded, by clients whose rows are prepared."""
    where = {"client": "", "server": ", the base model at the server"}
    placement = where.get(config.base.placement, "")
    if model.emulator is not None:
        placement = f", trained against an emulator: {model.emulator.words}"
    return Job(
        config=config,
        adapter=model.adapter,
        task=model.task,
        plugged=model.plugged,
        emulator=model.emulator.digest if model.emulator else None,
        base_name=f"{config.base.path} behind {config.base.encoder}",
        base_digest=model.digest,
        adapter_words=_adapter_words(config) + placement + method_words(config),
        clients=tuple(clients),
        test=model.prepare(test) if test else None,
        labels=answers,
        data_words=data_words,
        warnings=warnings,
        directions=directions_for(config, model.adapter),
        parts=parts_for(config, model.adapter),
        shown=_shown(test) if test else (),
        connector=model.client.connector_path,
        meter=model.meter,
        cut_width=model.decoder.width,
    )


def _adapter_words(config: Config) -> str:
    found = config.adapter
    if found.kind == "ladder":
        return f"ladder of {found.rungs} rungs, {found.rank} wide"
    if found.output_rank is None:
        return f"NanoAdapter-I and -T r={found.rank}"
    return f"NanoAdapter-I and -T r={found.rank}, -O r={found.output_rank}"


def load_questions(config: Config) -> FederatedQuestions:
    """The data that the configuration names; raises `DataError` or `ConfigError`."""
    data = config.data
    if data.source != PACKAGED_DATA:
        if data.partition is not None:
            raise ConfigError(
                "data.partition: a folder of clients is divided already; leave it out"
            )
        found = load_question_folder(Path(data.source).expanduser(), data.labels, data.min_examples)
        if data.clients not in (None, len(found.clients)):
            raise ConfigError(
                f"data.clients = {data.clients}, but {data.source} has {len(found.clients)} "
                "client folders; leave it out or correct it"
            )
        return found
    if data.labels:
        raise ConfigError("data.labels: easy-vqa has its own answers; leave it out")
    return load_easy_vqa(
        partition=PartitionSpec.parse(data.partition or "iid"),
        clients=data.clients or DEFAULT_CLIENTS,
        seed=config.seed,
        min_size=data.min_examples,
    )


def _shown(test: QuestionExamples) -> tuple[Shown, ...]:
    """Questions about different images, each kind of answer in turn as far as there are."""
    rng = np.random.default_rng(0)
    rows: list[int] = []
    seen: set[int] = set()
    for row in rng.permutation(len(test)):
        common = sum(test.labels[chosen] == test.labels[row] for chosen in rows)
        if int(test.images[row]) not in seen and common < 2 and len(rows) < SHOWN:
            rows.append(int(row))
            seen.add(int(test.images[row]))
    return tuple(
        Shown(row, test.questions[row], _thumbnail(test.files[test.images[row]])) for row in rows
    )


def _thumbnail(file: Path) -> bytes:
    from PIL import Image

    with Image.open(file) as image:
        small = image.convert("RGB")
        small.thumbnail((_SHOWN_PIXELS, _SHOWN_PIXELS))
        data = io.BytesIO()
        small.save(data, "PNG")
    return data.getvalue()
