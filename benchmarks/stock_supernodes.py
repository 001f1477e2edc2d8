"""The same federation on Flower's own processes: SuperLink, SuperExec, and stock SuperNodes.

    python benchmarks/stock_supernodes.py --rounds 3

First `fedtune server` and `fedtune client`, then, with the same clients, model, steps and masks,
the app of this repository (`server/app.py`, `client/app.py`) by `flwr run` on Flower's SuperLink
and SuperNodes with TLS and node authentication, started as Flower's manual says. A stock SuperNode
starts a process for each message, which loads torch and the base model anew. Linux only; nothing
but the loopback is used.
"""

from __future__ import annotations

import argparse
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from deployed import FEDTUNE, client_commands, metrics, prepare, run, start

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
CONNECTION = "bench"


def main() -> None:
    """Run both and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--port", type=int, default=19492)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "federation"
        settings = {"rounds.count": str(args.rounds), "train.steps": str(args.steps)}
        prepare(folder, args.clients, args.port, settings)
        run(folder, client_commands(folder, args.clients))
        own = metrics(folder / "run")
        stock = on_stock(Path(name), args)
    print(
        "| | round s, median | lowest to highest | beyond training s, median |\n|---|---|---|---|"
    )
    for words, records in (("fedtune client", own), ("stock SuperNodes", stock)):
        rounds = [record["seconds"] for record in records[1:]]
        # Clients train at the same time; the mean is what all of them together can be held to.
        beyond = [r["seconds"] - r["train_seconds"] / args.clients for r in records[1:]]
        spread = f"{min(rounds):.2f} to {max(rounds):.2f}"
        medians = statistics.median(rounds), statistics.median(beyond)
        print(f"| {words} | {medians[0]:.2f} | {spread} | {medians[1]:.2f} |")


def on_stock(folder: Path, args: argparse.Namespace) -> list[dict[str, float]]:
    """The rounds of the same job on Flower's own processes."""
    keys, home, out = folder / "keys", folder / "home", folder / "stock"
    home.mkdir()
    hosts = ["--host", "127.0.0.1", "--host", "localhost"]
    subprocess.run([FEDTUNE, "keys", "server", keys, *hosts], check=True, capture_output=True)
    secret, address = folder / "secret", f"127.0.0.1:{args.port + 1}"
    secret.write_text(secrets.token_hex(32))
    (home / "config.toml").write_text(
        f'[superlink.{CONNECTION}]\naddress = "{address}"\nroot-certificates = "{keys}/ca.crt"\n'
    )
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    os.environ.update(environment)  # for those that are started in the background
    authority = ["--root-certificates", keys / "ca.crt"]
    shared = ["--superexec-auth-secret-file", secret]
    link = [BIN / "flower-superlink", "--host", "127.0.0.1", "--port", args.port + 1]
    link += ["--ssl-ca-certfile", keys / "ca.crt", "--ssl-certfile", keys / "server.crt"]
    link += ["--ssl-keyfile", keys / "server.key", "--enable-supernode-auth"]
    link += ["--database", folder / "state.db", "--isolation", "process", *shared]
    executor = [BIN / "flower-superexec", "--runtime-api-address", address, *authority, *shared]
    with ExitStack() as stack:
        background(stack, folder / "superlink.log", link)
        time.sleep(10)  # Flower says nowhere that it is ready
        background(stack, folder / "superexec.log", executor)
        for place in range(args.clients):
            key = folder / f"node-{place}"
            make = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", key]
            subprocess.run(make, check=True)
            register = [BIN / "flwr", "supernode", "register", f"{key}.pub", CONNECTION]
            subprocess.run(register, check=True, env=environment, capture_output=True)
            node = [BIN / "flower-supernode", "--superlink", address, *authority]
            node += ["--auth-supernode-private-key", key, "--port", args.port + 2 + place]
            node += ["--node-config", f"partition-id={place} num-partitions={args.clients}"]
            background(stack, folder / f"node-{place}.log", node)
        time.sleep(10)
        settings = (
            f"rounds.count={args.rounds} train.steps={args.steps} data.clients={args.clients}"
        )
        config = f'out="{out}" set="{settings} rounds.evaluate-every=0"'
        command = [BIN / "flwr", "run", ROOT, CONNECTION, "--stream", "-c", config]
        with (folder / "run.log").open("wb") as log:
            subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)
        if not (out / "metrics.jsonl").exists():
            raise SystemExit((folder / "run.log").read_text()[-3000:])
        return metrics(out)


def background(stack: ExitStack, log: Path, command: Sequence[object]) -> None:
    """Run a command until the block is left."""
    process = start(log, command)
    stack.callback(process.wait)
    stack.callback(process.terminate)


if __name__ == "__main__":
    main()
