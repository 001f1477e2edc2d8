"""A site that answers questions about images, with the base model here or at the server."""

from __future__ import annotations

import torch

from fedtune.base.answering import first_tokens
from fedtune.base.emulator import Emulator
from fedtune.base.kit import ClientKit
from fedtune.config import Config
from fedtune.data.question_files import read_questions
from fedtune.deploy.site_files import SiteFiles
from fedtune.deploy.site_training import SiteTraining
from fedtune.errors import ConfigError
from fedtune.simulation.emulation import check_emulator
from fedtune.simulation.job import parts_for, torch_settings
from fedtune.simulation.vision import VisionClient, VisionModel
from fedtune.train.cut import AcrossCut, Behind, WholeModel
from fedtune.train.cut_forward import forward_trainer
from fedtune.train.forward_only import directions_of
from fedtune.train.protection import protected
from fedtune.train.torch_trainer import TorchTrainer
from fedtune.train.trainer import Trainer


def load_questions(files: SiteFiles) -> SiteTraining:
    """What trains at this site, on its questions; raises `UsageError`."""
    config = files.federation
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
    return SiteTraining(
        trainer,
        half.prepare(train),
        half.prepare(test) if test else None,
        words,
        parts_for(config, half.adapter),
    )


def _model(files: SiteFiles) -> tuple[VisionClient, str, str]:
    """The client's half, the digest of all that is frozen, and in words where the base model is."""
    config, answers = files.federation, files.federation.data.labels
    if not files.has_kit:
        whole = VisionModel(config, answers)
        return whole.client, whole.digest, f"base model {config.base.path}"
    kit = read_kit(files)
    table, tokenizer = kit.table(), kit.tokenizer()
    behind: Behind
    if files.splits:
        from fedtune.deploy.base_link import connect_base  # gRPC, which an emulator does not need

        tokens = first_tokens(tokenizer, answers).tolist()
        remote = connect_base(files, kit.manifest.base_digest, tokens, table.embedding_dim)
        behind = AcrossCut(protected(remote, config.split), config.split.labels)
        emulated, words = None, f"base model at {files.base_server}"
    else:
        emulator = kit_emulator(kit, config)
        behind, emulated, words = WholeModel(emulator), emulator.digest, emulator.words
    half = VisionClient(
        config,
        tokenizer,
        table,
        kit.manifest.max_tokens,
        kit.connector,
        behind,
        kit.head(len(answers)) if config.rungs else None,
    )
    digest = half.digest(kit.manifest.base_digest, answers, emulated)
    return half, digest, f"{words}, kit {kit.digest[:16]}"


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


def kit_emulator(kit: ClientKit, config: Config) -> Emulator:
    """What this site trains against; raises `UsageError`."""
    tokens = first_tokens(kit.tokenizer(), config.data.labels)
    found = Emulator(kit.emulator, tokens, config.emulator.digest)
    check_emulator(config, kit.manifest.base_digest, found)
    return found
