"""What trains at a site."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.train.trainer import Dataset, Trainer

# What a device imports besides, where the base model stays at the server: the modules of gRPC and
# Pillow.
IN_FRONT_OF_A_CUT = ("grpc", "PIL")


@dataclass(frozen=True)
class SiteTraining:
    """A trainer, the site's rows as it takes them, and in words what was loaded."""

    trainer: Trainer
    train: Dataset
    test: Dataset | None
    words: str
