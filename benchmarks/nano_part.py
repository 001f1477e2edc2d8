"""One process of `nano.py`: the server of a base model, or a client with or without one.

    python benchmarks/nano_part.py server FOLDER PORT
    python benchmarks/nano_part.py client CLIENT_TOML

The server says `ready` and works until its input ends. A client trains a little and prints JSON:
the median milliseconds of a step, and the process's peak in MiB.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from itertools import repeat
from pathlib import Path

import numpy as np

STEPS, BATCH, THREADS = 6, 8, 2


def server(folder: Path, port: int) -> None:
    """Host the decoder of the federation in `folder`."""
    from fedtune.deploy.server import Deployment
    from fedtune.deploy.vision_server import serve_base, vision_model, vision_server_job

    deployment = Deployment.read(folder / "federation.toml")
    model = vision_model(deployment.federation)
    job = vision_server_job(deployment.federation, model, [], None)
    keys, roster = folder / "server-keys", deployment.members.roster
    with serve_base(model, job, roster, keys, "127.0.0.1", port):
        print("ready", flush=True)
        sys.stdin.read()


def client(path: Path) -> None:
    """Train as `fedtune client` does, without its rounds."""
    from fedtune.deploy.site_files import SiteFiles
    from fedtune.deploy.vision_site import load_questions
    from fedtune.resources import peak_memory
    from fedtune.train.trainer import LocalPlan

    site = load_questions(SiteFiles.read(path))
    adapter = np.zeros(site.trainer.manifest.size, np.float32)
    times = []
    for step in range(STEPS):
        rows = np.arange(step * BATCH, (step + 1) * BATCH)
        started = time.perf_counter()
        site.trainer.train(adapter, site.train, LocalPlan(iter([rows]), repeat(1e-3, 1), 0))
        times.append(1000 * (time.perf_counter() - started))
    peak = peak_memory() / 2**20
    print(json.dumps({"ms": statistics.median(times[1:]), "peak": peak}))


if __name__ == "__main__":
    role, where, *more = sys.argv[1:]
    if role == "server":
        server(Path(where), int(more[0]))
    else:
        client(Path(where))
