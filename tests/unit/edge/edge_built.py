"""Artifacts, and what they were made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedtune.config import Config
from fedtune.edge.artifacts import EdgeArtifacts
from fedtune.simulation.job import TextModel


@dataclass(frozen=True)
class Built:
    """Artifacts, and the model and configuration of which they were made."""

    folder: Path
    config: Config
    model: TextModel

    @property
    def artifacts(self) -> EdgeArtifacts:
        """The artifacts, read anew."""
        return EdgeArtifacts(self.folder)
