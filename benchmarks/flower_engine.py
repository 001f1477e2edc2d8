"""The same federation on Flower's own simulation engine and by `fedtune simulate`.

    pip install -e '.[simulate,ray]'
    python benchmarks/flower_engine.py --rounds 2

Runs `flwr run .` in the repository (ServerApp and ClientApp of `server/` and `client/`, clients
in Ray actors), then `fedtune simulate` with the same configuration, and compares the adapters
bit for bit. Flower's local SuperLink, which `flwr run` starts, is ended afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def main() -> None:
    """Run both and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE")
    args = parser.parse_args()
    settings = [f"rounds.count={args.rounds}", f"data.clients={args.clients}", *args.set]
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        seconds = {
            "flwr run": on_flower(tmp / "flower", settings, args.clients, tmp / "home"),
            "fedtune simulate": on_fedtune(tmp / "fedtune", settings),
        }
        rows = {name: results(tmp / name.split()[0].replace("flwr", "flower")) for name in seconds}
    print("| engine | whole command s | rounds s | accuracy | adapter |\n|---|---|---|---|---|")
    for name, (round_seconds, accuracy, digest) in rows.items():
        total = seconds[name]
        print(f"| {name} | {total:.1f} | {round_seconds} | {accuracy:.1%} | {digest[:16]} |")
    same = len({digest for _, _, digest in rows.values()}) == 1
    print("PASS the adapters are equal bit for bit" if same else "MISS the adapters differ")


def on_flower(out: Path, settings: list[str], clients: int, home: Path) -> float:
    """Seconds of `flwr run . --stream`."""
    home.mkdir()
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    resources = f"num-supernodes={clients} client-resources-num-cpus=1 init-args-num-cpus=2"
    config = f'out="{out}" set="{" ".join(settings)}"'
    command = [BIN / "flwr", "run", ".", "--stream", "--federation-config", resources, "-c", config]
    before = set(psutil.pids())
    started = time.perf_counter()
    try:
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started
    finally:
        end_superlink(before, home)


def end_superlink(before: set[int], home: Path) -> None:
    """End the processes that `flwr run` left: new ones whose environment names our home."""
    for process in psutil.process_iter():
        try:
            if process.pid not in before and process.environ().get("FLWR_HOME") == str(home):
                process.kill()
        except psutil.Error:
            continue


def on_fedtune(out: Path, settings: list[str]) -> float:
    """Seconds of `fedtune simulate`."""
    flags = [flag for setting in settings for flag in ("--set", setting)]
    started = time.perf_counter()
    command = [BIN / "fedtune", "simulate", "--json", "--out", out, *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def results(run: Path) -> tuple[str, float, str]:
    """Seconds of each round, final accuracy, and the adapter's digest."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = ", ".join(f"{json.loads(line)['seconds']:.1f}" for line in lines)
    passport = json.loads((run / "adapter" / "passport.json").read_text(encoding="utf-8"))
    return seconds, json.loads(lines[-1])["accuracy"], passport["adapter_digest"]


if __name__ == "__main__":
    main()
