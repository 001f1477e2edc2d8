"""The server's part of a federation of questions about images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedtune.config import Config, Limits
from fedtune.data.question_files import read_questions
from fedtune.data.questions import QuestionExamples
from fedtune.deploy.keys import SERVER_CERTIFICATE, SERVER_KEY
from fedtune.resources import usable_cores, use_one_arena
from fedtune.secagg.keys import Roster
from fedtune.simulation.job import Job, JobClient
from fedtune.simulation.vision import VisionModel
from fedtune.simulation.vision_job import job_of_vision
from fedtune.train.channel import CutTraffic, Meter

if TYPE_CHECKING:  # gRPC is not installed where no base model is served
    from fedtune.split.server import SplitServer


def vision_model(config: Config) -> VisionModel:
    """The whole model, on all cores; raises `UsageError`."""
    use_one_arena()  # the decoder computes in a thread of its own
    torch.set_num_threads(usable_cores())
    return VisionModel(config, config.data.labels)


def vision_server_job(
    config: Config, model: VisionModel, clients: list[JobClient], test: Path | None
) -> Job:
    """The job of a server that sees none of the clients' questions."""
    answers = config.data.labels
    found: QuestionExamples | None = read_questions(test, answers) if test else None
    words = "each site's own; the server sees none of it"
    return job_of_vision(config, model, clients, found, answers, words)


@dataclass(frozen=True)
class _Together:
    """What passed the cut in this process, and over the network."""

    own: Meter
    split: SplitServer

    @property
    def traffic(self) -> CutTraffic:
        """Both."""
        total = self.own.traffic
        for one in self.split.status.traffic.values():
            total = total + one
        return total


@contextmanager
def serve_base(
    model: VisionModel,
    job: Job,
    roster: Roster,
    keys: Path,
    address: tuple[str, int],
    limits: Limits,
) -> Iterator[tuple[Job, SplitServer]]:
    """Host the decoder for the clients of `roster`; the job then counts what they send.

    Raises `ConfigError`.
    """
    from fedtune.split.server import SplitServer, Tls, terms_of

    config = job.config
    terms = terms_of(model.decoder, config.digest, config.split.activations)
    tls = Tls((keys / SERVER_CERTIFICATE).read_bytes(), (keys / SERVER_KEY).read_bytes())
    with SplitServer(model.decoder, terms, roster, *address, tls, limits) as server:
        yield replace(job, meter=_Together(model.meter, server)), server
