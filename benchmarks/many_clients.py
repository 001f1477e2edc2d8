"""Fifty sites at one server: does every round end with all of them?

    python benchmarks/many_clients.py --clients 50 --rounds 20

Everything but the training is as deployed: TLS, masks among all, a network process and a training
process per site, what server and sites remember on the disk. The trainer is trivial (it adds noise
drawn from its site's name) and needs no torch, so that fifty fit into the memory of one machine. A
site's audit log is left out. Linux only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from deployed import metrics, prepare, run

SHAPE = "shape.json"


def main() -> None:
    """Run and print a table; or be one of the sites."""
    if sys.argv[1:2] == ["--site"]:
        site(Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--port", type=int, default=19392)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "federation"
        settings = {"rounds.count": str(args.rounds), "data.min-examples": "1"}
        prepare(folder, args.clients, args.port, settings)
        write_shape(folder)
        files = sorted((folder / "sites").glob("*/client.toml"))
        peaks = run(folder, [[sys.executable, __file__, "--site", file] for file in files])
        records: list[dict[str, Any]] = metrics(folder / "run")
    whole = sum(len(record["clients"]) == args.clients for record in records)
    failed = sum(len(record["failed"]) + len(record["late"]) for record in records)
    seconds = [record["seconds"] for record in records]
    print("| | median | lowest to highest |\n|---|---|---|")
    spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
    print(f"| round, s | {statistics.median(seconds):.2f} | {spread} |")
    for words, peak in sorted(peaks.items()):
        print(f"| {words}, peak RSS MiB | {peak:.0f} | |")
    right = whole == args.rounds and not failed
    print(
        f"\n{'PASS' if right else 'MISS'} {whole} of {args.rounds} rounds with all "
        f"{args.clients} clients, {failed} failures"
    )


def write_shape(folder: Path) -> None:
    """What a trainer must know of the model, for sites that do not load it."""
    from fedtune.config import load_config
    from fedtune.simulation.job import TextModel

    config = load_config(folder / "federation.toml")
    model = TextModel(config, len(config.data.labels))
    tensors = [[tensor.name, list(tensor.shape)] for tensor in model.adapter.manifest.tensors]
    shape = {"base": model.base.digest, "tensors": tensors}
    (folder / SHAPE).write_text(json.dumps(shape))


def site(path: Path) -> None:
    """`fedtune client` with this file as its training process."""
    from fedtune.deploy.client import run_client

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    sys.exit(run_client(path, True, say, (sys.executable, __file__, "--train")))


class Rows:
    """A site's rows, of which only the number matters."""

    def __init__(self, count: int) -> None:
        self.lengths = np.ones(count, np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, rows: Any) -> Rows:
        """As many rows."""
        return Rows(len(rows))

    def concatenate(self, others: Any) -> Rows:
        """As many rows as all together."""
        return Rows(len(self) + sum(map(len, others)))


class TrivialTrainer:
    """Adds a little noise, the same each time."""

    def __init__(self, shape: dict[str, Any], name: str) -> None:
        from fedtune.types import Manifest

        self.manifest = Manifest.of((n, tuple(size)) for n, size in shape["tensors"])
        self.base_digest: str = shape["base"]
        self._seed = sum(name.encode())

    def train(self, adapter: Any, data: Rows, plan: Any) -> Any:
        """See `fedtune.train.trainer.Trainer`."""
        from fedtune.train.trainer import LocalResult

        noise = np.random.default_rng(self._seed).normal(0.0, 1e-3, len(adapter))
        return LocalResult((adapter + noise).astype(np.float32), 1.0, 0.0)

    def evaluate(self, adapter: Any, data: Rows) -> Any:
        """Nobody asks."""
        raise NotImplementedError


def make_machine(path: Path) -> tuple[Any, str]:
    """The client of a site, without torch."""
    from fedtune.deploy.site_files import SiteFiles
    from fedtune.round.client import ClientMachine
    from fedtune.round.membership import Membership
    from fedtune.round.site import SiteStore
    from fedtune.update import make_pipeline

    files = SiteFiles.read(path)
    config, name = files.federation, files.config.site.name
    trainer = TrivialTrainer(json.loads((path.parents[2] / SHAPE).read_text()), name)
    members, keys = files.members(), files.keys()
    store = SiteStore(files.find(files.config.site.memory))
    membership = Membership(files.config.policy, store, keys.identity, members.roster)
    pipeline = make_pipeline(config.update, trainer.manifest.size)
    machine = ClientMachine(name, config, trainer, Rows(100), None, pipeline, membership)
    return machine, "a trivial trainer"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        from fedtune.deploy.training import serve

        serve(lambda: make_machine(Path(sys.argv[2])))
    main()
