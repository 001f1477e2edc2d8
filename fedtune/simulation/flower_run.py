"""The same simulation inside Flower's own runtime: what `flwr run .` starts.

Flower's simulation engine holds the clients in Ray actors and carries the messages; job,
strategy, rounds and results are those of `fedtune simulate`.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedtune.config import Config
from fedtune.errors import RunFolderError
from fedtune.flower.client_app import make_client_app
from fedtune.report.progress import make_progress
from fedtune.round.client import ClientMachine
from fedtune.simulation.commands import SimulateRequest, resolve_config
from fedtune.simulation.folder import check_new, free_path
from fedtune.simulation.job import Job
from fedtune.simulation.jobs import make_job
from fedtune.simulation.run import Options, Simulation, create_run
from fedtune.simulation.sites import Sites, needs_sites


def server_app() -> ServerApp:
    """A server app that runs the simulation of the app's run configuration."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config = _config(context.run_config)
        given = str(context.run_config.get("out", ""))
        out = Path(given) if given else free_path(Path("runs"), "flower")
        check_new(out)
        job = make_job(config)
        progress = make_progress()
        progress.started([f"{len(job.clients)} clients on Flower's engine"], config.rounds.count)
        with create_run(job, out, references=False) as run:
            # Evaluation in this process: the workers here are Flower's.
            sites = _sites(job, context)
            options = Options(workers=0)
            outcome = Simulation(job, run, options, progress, grid=grid, parties=sites).execute()
        if outcome.error:
            raise outcome.error

    return app


def client_app() -> ClientApp:
    """A client app that is the client of its node's partition."""
    return make_client_app(_machine, disclose_errors=True)


def _machine(context: Context) -> ClientMachine:
    items = tuple(sorted((key, str(value)) for key, value in context.run_config.items()))
    job, place = _job(items), int(context.node_config["partition-id"])
    sites = _sites(job, context)
    return job.machine(place, sites.membership(job.clients[place].name) if sites else None)


def _sites(job: Job, context: Context) -> Sites | None:
    """The sites' memories lie where the server and all actors of one Flower run look for them."""
    if not needs_sites(job.config):
        return None
    folder = Path(tempfile.gettempdir()) / f"fedtune-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise RunFolderError(f"{folder}: others can use this folder; remove it")
    names = [client.name for client in job.clients]
    return _sites_in(folder / f"{context.run_id}.db", tuple(names))


@lru_cache(maxsize=1)
def _sites_in(path: Path, names: tuple[str, ...]) -> Sites:
    return Sites(path, list(names))


@lru_cache(maxsize=1)
def _job(run_config: tuple[tuple[str, str], ...]) -> Job:
    """One resident base model per actor process."""
    return make_job(_config(dict(run_config)))


def _config(run_config: Mapping[str, object]) -> Config:
    """`config` names a file, else `preset` a preset; `set` has overrides as in a shell."""
    path = str(run_config.get("config", ""))
    return resolve_config(
        SimulateRequest(
            preset=None if path else str(run_config.get("preset", "hospitals")),
            config=Path(path) if path else None,
            settings=tuple(shlex.split(str(run_config.get("set", "")))),
        )
    )
