"""A site that answers questions about images, with the base model here or at the server."""

from __future__ import annotations

import torch

from fedtune.base.answering import first_tokens
from fedtune.base.kit import ClientKit
from fedtune.data.question_files import read_questions
from fedtune.deploy.site_files import SiteFiles
from fedtune.deploy.site_training import SiteTraining
from fedtune.errors import ConfigError
from fedtune.simulation.job import torch_settings
from fedtune.simulation.vision import VisionClient, VisionModel
from fedtune.split.client import GrpcBase
from fedtune.train.channel import Meter
from fedtune.train.cut import AcrossCut
from fedtune.train.cut_forward import forward_trainer
from fedtune.train.forward_only import directions_of
from fedtune.train.protection import protected
from fedtune.train.torch_trainer import TorchTrainer
from fedtune.train.trainer import Trainer
from fedtune.types import digest_of
from fedtune.wire.split import Terms


def load_questions(files: SiteFiles) -> SiteTraining:
    """What trains at this site, on its questions; raises `UsageError`."""
    config, machine = files.federation, files.config.machine
    if machine.runtime != "torch":
        raise ConfigError(
            f'machine.runtime = "{machine.runtime}" knows no images yet; set it to "torch"'
        )
    torch.set_num_threads(config.train.threads)
    answers, data = config.data.labels, files.config.data
    half, digest, words = _model(files)
    train = read_questions(files.find(data.train), answers)
    test = read_questions(files.find(data.test), answers) if data.test else None
    torch_trainer = TorchTrainer(half.adapter, half.task, digest, torch_settings(config.train))
    trainer: Trainer = torch_trainer
    if config.train.method == "forward-only":
        directions = directions_of(config, half.adapter.manifest, half.adapter.read())
        trainer = forward_trainer(config, torch_trainer, half.adapter, half.task, directions)
    return SiteTraining(trainer, half.prepare(train), half.prepare(test) if test else None, words)


def _model(files: SiteFiles) -> tuple[VisionClient, str, str]:
    """The client's half, the digest of all that is frozen, and in words where the base model is."""
    config, answers = files.federation, files.federation.data.labels
    if not files.splits:
        whole = VisionModel(config, answers)
        return whole.client, whole.digest, f"base model {config.base.path}"
    kit = read_kit(files)
    remote = connect_base(files, kit)
    half = VisionClient(
        config,
        kit.tokenizer(),
        kit.table(),
        kit.manifest.max_tokens,
        kit.connector,
        AcrossCut(protected(remote, config.split), config.split.labels),
        kit.head(len(answers)) if config.rungs else None,
    )
    digest = half.digest(kit.manifest.base_digest, answers)
    return half, digest, f"base model at {files.base_server}, kit {kit.digest[:16]}"


def read_kit(files: SiteFiles) -> ClientKit:
    """The kit of this site, which is of its federation; raises `UsageError`."""
    config, machine = files.federation, files.config.machine
    kit = ClientKit(files.find(machine.kit), machine.kit_digest)
    if config.base.digest not in (None, kit.manifest.base_digest):
        raise ConfigError(
            f"{kit.folder}: made of the base model {kit.manifest.base_digest}, base.digest says "
            f"{config.base.digest}; ask the operator for this federation's kit"
        )
    return kit


def connect_base(files: SiteFiles, kit: ClientKit) -> GrpcBase:
    """The base model at the server, as this site; it connects when it is asked."""
    config = files.federation
    tokens = first_tokens(kit.tokenizer(), config.data.labels)
    terms = Terms(
        config.digest,
        kit.manifest.base_digest,
        digest_of(tokens.tolist()),
        kit.table().embedding_dim,
        len(tokens),
        config.split.activations,
        config.rungs,
    )
    authority = files.find(files.config.site.certificate).read_bytes()
    identity, roster = files.keys().identity, files.members().roster
    return GrpcBase(files.base_server, authority, identity, roster, terms, Meter())
