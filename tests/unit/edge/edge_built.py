"""Artifacts, and what they were made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedtune.base.kit import ClientKit
from fedtune.config import Config
from fedtune.edge.artifacts import EdgeArtifacts
from fedtune.simulation.job import TextModel
from fedtune.simulation.vision import VisionModel


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


NANO = """
[base]
path = "{base}"
task = "visual-question-answering"
placement = "server"
connector = "{connector}"
max-length = 40
[adapter]
kind = "nano"
rank = 4
[data]
labels = ["yes", "no", "circle", "red", "blue"]
"""


@dataclass(frozen=True)
class NanoBuilt:
    """Artifacts of NanoAdapters, and the kit and configuration of which they were made."""

    folder: Path
    config: Config
    kit: ClientKit

    @property
    def artifacts(self) -> EdgeArtifacts:
        """The artifacts, read anew."""
        return EdgeArtifacts(self.folder)

    def model(self, placement: str = "client") -> VisionModel:
        """The whole model, with PyTorch."""
        base = self.config.base.model_copy(update={"placement": placement})
        return VisionModel(self.config.model_copy(update={"base": base}), self.config.data.labels)
