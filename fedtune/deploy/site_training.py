"""What trains at a site."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.adapter.parts import Parts
from fedtune.train.trainer import Dataset, Trainer
from fedtune.types import Manifest

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
    parts: Parts | None = None  # of the trainer's adapter, if some of it stays here

    @property
    def manifest(self) -> Manifest:
        """Of what travels."""
        return self.parts.shared if self.parts else self.trainer.manifest
