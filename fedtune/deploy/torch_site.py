"""A site that trains with PyTorch."""

from __future__ import annotations

import torch

from fedtune.data import TextExamples
from fedtune.deploy.site_files import SiteFiles
from fedtune.deploy.site_training import SiteTraining
from fedtune.round.local import record_privacy
from fedtune.simulation.job import TextModel, parts_for, torch_settings
from fedtune.train.forward_only import ForwardOnlyTrainer, directions_of
from fedtune.train.torch_trainer import TorchTrainer, choose_device
from fedtune.train.trainer import Trainer


def load(files: SiteFiles, train: TextExamples, test: TextExamples | None) -> SiteTraining:
    """The base model with its adapter, on the site's device; raises `UsageError`."""
    config = files.federation
    device = choose_device(config.train.device)
    torch.set_num_threads(config.train.threads)
    model = TextModel(config, len(config.data.labels))
    initial, parts = model.adapter.read(), parts_for(config, model.adapter)
    if device.type != "cpu":
        model.adapter.to(device)
    settings = torch_settings(config.train, record_privacy(config, len(train)))
    torch_trainer = TorchTrainer(model.adapter, model.task, model.base.digest, settings)
    trainer: Trainer = torch_trainer
    if config.train.method == "forward-only":
        directions = directions_of(config, model.adapter.manifest, initial)
        trainer = ForwardOnlyTrainer(torch_trainer, directions, config.train.perturbation)
    return SiteTraining(
        trainer,
        model.prepare(train),
        model.prepare(test) if test else None,
        f"base model {config.base.path}",
        parts,
    )
