"""The job of a configuration, whatever its task."""

from __future__ import annotations

from fedtune.config import Config
from fedtune.simulation.job import Job, text_job


def make_job(config: Config) -> Job:
    """What is simulated; raises `UsageError`."""
    if config.base.task == "visual-question-answering":
        from fedtune.simulation.vision_job import vision_job

        return vision_job(config)
    return text_job(config)
