"""`fedtune server`: Flower's SuperLink, and the rounds that it carries.

The run is a folder as a simulation's is: killed at any moment and started again, the server goes
on where its journal ends.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import numpy as np

from fedtune.base.resolve import resolve_base
from fedtune.config import Config, Limits, Listen, load_config, load_server
from fedtune.data.labelled import load_examples
from fedtune.deploy.keys import (
    SERVER_CERTIFICATE,
    SERVER_KEY,
    Members,
    check_private,
    read_identity,
    read_roster,
)
from fedtune.deploy.server_audit import ServerAudit
from fedtune.deploy.superlink import Doors, SuperLinkProcess
from fedtune.deploy.watch import Connections, make_status, watched
from fedtune.errors import ConfigError, KeyFileError, NetworkError, ServerUnreachable
from fedtune.flower.fleet_grid import FleetGrid
from fedtune.flower.internals import take_over_log
from fedtune.flower.strategy import farewell
from fedtune.report.progress import Progress
from fedtune.round.masked import Authority
from fedtune.secagg.keys import SERVER
from fedtune.simulation.folder import RunFolder
from fedtune.simulation.job import (
    Job,
    JobClient,
    TextModel,
    check_cohort,
    check_privacy,
    job_of_model,
    shared_size,
)
from fedtune.simulation.run import Options, Outcome, Simulation, check_same_job, create_run
from fedtune.train.task import Rows

if TYPE_CHECKING:  # gRPC, which only a server of a base model needs
    from fedtune.split.server import SplitServer

SETTINGS = "server.toml"
DATABASE = "superlink.db"
LARGEST_REST = 1 << 20  # bytes of an answer that are not values
LARGEST_IN_MEMORY = 1 << 30  # bytes of messages that Flower's SuperLink may have to hold
LOG = "superlink.log"


@dataclass(frozen=True)
class Deployment:
    """The server's files."""

    federation: Config
    listen: Listen
    limits: Limits
    folder: Path
    members: Members
    authority: Authority

    @classmethod
    def read(cls, path: Path) -> Deployment:
        """Read federation.toml and what lies beside it; raises `UsageError`."""
        folder = path.parent
        settings = load_server(folder / SETTINGS)
        listen = settings.server
        own = {"base.path": listen.base or None}
        federation = load_config(path, values=own)
        # As all paths that are named in a file, relative to it.
        named = {
            "base.connector": federation.base.connector,
            "emulator.path": federation.emulator.path,
        }
        own |= {key: str(folder / Path(name).expanduser()) for key, name in named.items() if name}
        federation = load_config(path, values=own)
        if federation.lacks_labels:
            raise ConfigError(f"{path}: data.labels is missing; name the labels in their order")
        members = read_roster(folder / listen.roster)
        identity = read_identity(folder / listen.keys, SERVER)
        if members.roster.keys[SERVER] != identity.public_key:
            raise KeyFileError(f"{listen.roster}: made for another server; see fedtune keys roster")
        check_private(folder / listen.keys / SERVER_KEY)
        return cls(
            federation,
            listen,
            settings.limits,
            folder,
            members,
            Authority(identity, members.roster),
        )

    def find(self, name: str) -> Path:
        """A path as server.toml means it."""
        return self.folder / Path(name).expanduser()

    def epsilon(self, run_id: str, delta: float) -> float | None:
        """Each site keeps its own account of what its records have spent."""
        return None

    def close(self) -> None:
        """Nothing is held open."""


def run_server(path: Path, progress: Progress) -> Outcome:
    """Run the federation to its end, or go on with it; raises `UsageError`."""
    signal.signal(signal.SIGTERM, _stop)
    deployment = Deployment.read(path)
    progress.note(f"loading the base model {deployment.federation.base.path}")
    take_over_log()
    with _job(deployment) as (job, base):
        return _run(deployment, job, base, progress)


def _run(deployment: Deployment, job: Job, base: SplitServer | None, progress: Progress) -> Outcome:
    run_path = deployment.find(deployment.listen.run)
    with (
        _open_run(job, run_path) as run,
        ServerAudit(deployment.authority, job, run) as audit,
    ):
        listen, keys = deployment.listen, deployment.find(deployment.listen.keys)
        doors = _doors(deployment, job, run_path)
        status = make_status(job.config, deployment.members.transport, run.journal)
        with (
            SuperLinkProcess(doors, deployment.members.transport) as link,
            watched(listen.status_address, keys, status, link, base) as words_of_status,
        ):
            clients = len(deployment.members.transport)
            done = len(run.journal.records())
            progress.started(
                [
                    f"listening at {listen.host}:{link.port} for {clients} clients; "
                    f"roster {deployment.members.roster.digest.hex()[:16]}",
                    *([f"the base model at {listen.host}:{base.port}"] if base else []),
                    *words_of_status,
                    *([f"going on after round {done}"] if done else []),
                ],
                job.config.rounds.count,
            )
            # Values under masks have at most 62 bits.
            largest = job.config.values_sent(job.manifest.size) * 8 + LARGEST_REST
            connections = Connections(deployment.members.transport, progress, status)
            grid = FleetGrid(link.address, link.ticket, largest, connections.looked)
            options = Options(workers=0, patience=listen.patience)
            simulation = Simulation(
                job,
                run,
                options,
                progress,
                grid=grid,
                parties=deployment,
                watchers=[audit, status],
            )
            try:
                outcome = simulation.execute()
            except ServerUnreachable:
                link.check()
                raise
            audit.ended(outcome.summary)
            # Whoever hears it finds out if the log is cut off or written anew later.
            head = f"head of the server's audit log: {audit.head}"
            progress.note(head)
            status.ended("failed" if outcome.error else "finished", str(outcome.error or ""))
            words = f"{outcome.summary.rounds} rounds, {outcome.summary.status}"
            _tell_the_end(grid, f"{words}; {head}", progress)
            return outcome


def _doors(deployment: Deployment, job: Job, run: Path) -> Doors:
    listen, keys = deployment.listen, deployment.find(deployment.listen.keys)
    # One adapter down for all, and at worst every client's update up at a time.
    sent = job.config.values_sent(job.manifest.size) * len(deployment.members.transport)
    held = 4 * (job.manifest.size + sent)
    offers = offers_base(listen, job.config)
    return Doors(
        listen.host,
        listen.port,
        keys / SERVER_CERTIFICATE,
        keys / SERVER_KEY,
        run / DATABASE if held > LARGEST_IN_MEMORY else None,
        run / LOG,
        resolve_base(job.config.base.path) if offers else None,
        # Of the decoder alone, which is what sites ask for; the job's may have an encoder in it.
        job.config.base.digest or "",
    )


def offers_base(listen: Listen, config: Config) -> bool:
    """Whether sites can fetch the base model here; never one that stays at the server."""
    held_by_sites = config.base.placement == "client"
    return listen.offer_base and config.base.digest is not None and held_by_sites


def _tell_the_end(grid: FleetGrid, words: str, progress: Progress) -> None:
    try:
        farewell(grid, words)
    except NetworkError as error:
        # All of it is on the disk; what the sites have not heard changes nothing.
        progress.note(f"the sites were not told that the run is over: {error}")


def _open_run(job: Job, path: Path) -> RunFolder:
    if not path.exists():
        return create_run(job, path, references=False)
    run = RunFolder.open(path)
    check_same_job(job, run)
    return run


@contextmanager
def _job(deployment: Deployment) -> Iterator[tuple[Job, SplitServer | None]]:
    """The server's part of the job: the model, the clients' names, the common test set.

    While it is used, the base model is served if sites hold none.
    """
    config, listen = deployment.federation, deployment.listen
    labels, names = config.data.labels, sorted(deployment.members.transport)
    check_cohort(config, len(names))
    file = deployment.find(listen.test) if listen.test else None
    unknown = np.zeros(len(labels), np.int64)
    absent = [JobClient(name, Rows([]), None, unknown) for name in names]
    if config.base.task == "visual-question-answering":
        from fedtune.deploy.vision_server import serve_base, vision_model, vision_server_job

        vision = vision_model(config)
        check_privacy(config, shared_size(config, vision.adapter), len(names))
        job = vision_server_job(config, vision, absent, file)
        if config.base.placement != "server":
            yield job, None
            return
        keys, roster = deployment.find(listen.keys), deployment.members.roster
        address, limits = (listen.host, listen.base_port), deployment.limits
        with serve_base(vision, job, roster, keys, address, limits) as served:
            yield served
        return
    columns = config.data.text_column, config.label_column
    test = load_examples(file, labels, *columns) if file else None
    model = TextModel(config, len(labels))
    check_privacy(config, shared_size(config, model.adapter), len(names))
    words = "each site's own; the server sees none of it"
    yield job_of_model(config, model, absent, test, labels, words), None


class Terminated(KeyboardInterrupt):
    """Someone ends this process by SIGTERM, as a service manager does."""


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated
