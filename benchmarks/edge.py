"""Devices beside PyTorch: memory and time of a training step, of a whole client, and sizes.

    python benchmarks/edge.py --environments /var/tmp/edge

MiniLM, LoRA r=8, 8 texts of 64 tokens. Each measurement is a process of its own, in its own
environment, on the same batches with the same threads; they take turns, `--repeats` times. Peak
memory is the kernel's own count (VmHWM). The physical limit beside a training step is inference
with the same graph: no trainer holds less. The environments of devices are made in the folder, by
client/requirements.edge*.txt, if they are not there. Linux only.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import numpy as np
from edge_step import ROWS, TOKENS, make

ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    "torch": "torch",
    "ort/float32": "edge",
    "ort/int8": "edge",
    "stepgraph/float32": "edge-plain",
    "stepgraph/int8": "edge-plain",
    "inference/float32": "edge-plain",
    "inference/int8": "edge-plain",
    "forward-only/float32": "edge-plain",
    "forward-only/int8": "edge-plain",
}


def main() -> None:
    """Measure everything and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environments", type=Path, default=Path("/var/tmp/fedtune-edge"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the training")
    parser.add_argument("--port", type=int, default=19292)
    args = parser.parse_args()
    pythons = {name: environment(args.environments, name) for name in ("edge", "edge-plain")}
    pythons["torch"] = Path(sys.executable)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "federation"
        artifacts = prepare(folder, args.port)
        steps(artifacts, pythons, args.repeats)
        clients(folder, pythons)
        learning(artifacts, args.seeds)
    sizes(pythons)


def prepare(folder: Path, port: int) -> Path:
    """A federation of three hospitals with long texts, and its artifacts."""
    from deployed import FEDTUNE
    from deployed import prepare as init

    settings = {"rounds.count": "2", "train.steps": "5", "train.batch-size": str(ROWS)}
    init(folder, 3, port, settings | {"base.max-length": str(TOKENS)})
    for file in folder.glob("sites/*/train.csv"):
        with file.open(newline="") as found:
            head, *rows = csv.reader(found)
        with file.open("w", newline="") as out:
            # Each text with itself, until it is longer than what is not cut.
            csv.writer(out).writerows([head, *([" ".join([text] * 30), *x] for text, *x in rows)])
    artifacts = folder / "artifacts"
    command = [FEDTUNE, "edge", "build", folder / "federation.toml", "-o", artifacts]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    return artifacts


def environment(folder: Path, name: str) -> Path:
    """The Python of a device's environment, which is made if it is not there."""
    python = folder / name / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / name], check=True)
        install = [sys.executable, "-m", "pip", "--quiet", "--python", python, "install"]
        install += ["--no-deps", "--no-compile"]
        requirements = ROOT / "client" / f"requirements.{name}.txt"
        subprocess.run([*map(str, install), "-r", str(requirements)], check=True)
        subprocess.run([*map(str, install), str(ROOT)], check=True)
        for library in (folder / name).glob(
            "lib/python3*/site-packages/onnxruntime/capi/libonnxruntime.so.*"
        ):
            library.unlink()  # for programs in C, as docs/runbook.md says
    return python


def steps(artifacts: Path, pythons: dict[str, Path], repeats: int) -> None:
    """A table of training steps, each kind in processes of its own that take turns."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(repeats):
        for kind, where in KINDS.items():
            command = [pythons[where], ROOT / "benchmarks" / "edge_step.py", kind, artifacts]
            done = subprocess.run(
                [str(part) for part in command],
                check=True,
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            )
            found[kind].append(json.loads(done.stdout.splitlines()[-1]))
    torch_ms = statistics.median(one["ms"] for one in found["torch"])
    torch_peak = statistics.median(one["peak"] for one in found["torch"])
    print("| | ms | lowest to highest | of torch | peak RSS MiB | of torch | of inference |")
    print("|---|---|---|---|---|---|---|")
    for kind, values in found.items():
        ms, peak = (statistics.median(one[key] for one in values) for key in ("ms", "peak"))
        spread = f"{min(v['ms'] for v in values):.0f} to {max(v['ms'] for v in values):.0f}"
        precision = kind.partition("/")[2] or "float32"
        limit = statistics.median(one["peak"] for one in found[f"inference/{precision}"])
        print(
            f"| {kind} | {ms:.0f} | {spread} | {ms / torch_ms:.2f} | {peak:.0f} "
            f"| {peak / torch_peak:.2f} | {peak / limit:.2f} |"
        )
    aim("ort int8's peak memory of torch's", _ratio(found, "ort/int8", "torch", "peak"), 0.30)
    aim("stepgraph's time of torch's", _ratio(found, "stepgraph/float32", "torch", "ms"), 0.85)
    for precision in ("float32", "int8"):
        kinds = f"forward-only/{precision}", f"inference/{precision}"
        aim(f"{kinds[0]}'s peak memory of inference's", _ratio(found, *kinds, "peak"), 1.10)


def _ratio(found: dict[str, list[dict[str, float]]], one: str, other: str, key: str) -> float:
    """The median of the ratios within each turn."""
    pairs = zip(found[one], found[other], strict=True)
    return statistics.median(a[key] / b[key] for a, b in pairs)


def aim(what: str, value: float, limit: float, unit: str = "") -> None:
    """Say whether an aim is reached."""
    verdict = "PASS" if value <= limit else "MISS"
    print(f"{verdict} {what}: {value:.3g}{unit}, at most {limit}{unit}")


def clients(folder: Path, pythons: dict[str, Path]) -> None:
    """A federation of a workstation and two devices: memory of whole clients, bytes on the line."""
    from deployed import FEDTUNE, metrics, sizes, start

    environment_of = {"hospital-1": "torch", "hospital-2": "edge", "hospital-3": "edge-plain"}
    runtimes = {"edge": "ort", "edge-plain": "stepgraph"}
    processes, peaks = {}, defaultdict(dict)
    processes["server"] = start(
        folder / "server.log", [FEDTUNE, "server", folder / "federation.toml"]
    )
    for site, where in environment_of.items():
        file = folder / "sites" / site / "client.toml"
        if where in runtimes:
            keys = f'runtime = "{runtimes[where]}"\nprecision = "int8"\n'
            keys += 'artifacts = "../../artifacts"\n'
            file.write_text(file.read_text().replace("[machine]\n", f"[machine]\n{keys}"))
        command = [pythons[where], "-m", "fedtune.cli", "client", file, "--once"]
        processes[site] = start(folder / f"{site}.log", command)
    while any(process.poll() is None for process in processes.values()):
        if any(process.returncode for process in processes.values()):
            break
        for site in environment_of:
            for words, size in sizes(processes[site].pid):
                peaks[site][words] = max(peaks[site].get(words, 0.0), size)
        time.sleep(0.1)
    for name, process in processes.items():
        if process.returncode != 0:
            processes["server"].terminate()
            raise SystemExit(f"{name}: {(folder / f'{name}.log').read_text()}")
    print("\n| whole client | network process MiB | training process MiB | together | of torch |")
    print("|---|---|---|---|---|")
    total = {site: sum(found.values()) for site, found in peaks.items()}
    for site, where in environment_of.items():
        network, training = (peaks[site][f"client, {kind}"] for kind in ("network", "training"))
        name = where if where == "torch" else f"{runtimes[where]} int8"
        share = total[site] / total["hospital-1"]
        print(f"| {name} | {network:.0f} | {training:.0f} | {total[site]:.0f} | {share:.2f} |")
    aim(
        "a whole client with ort int8 of one with torch",
        total["hospital-2"] / total["hospital-1"],
        0.45,
    )
    passport = json.loads((folder / "artifacts" / "manifest.json").read_text())
    size = 4 * sum(int(np.prod(tensor["shape"])) for tensor in passport["adapter"])
    down = statistics.median(m["bytes_down"] for m in metrics(folder / "run")) / len(environment_of)
    aim(f"bytes to a device in a round, of the adapter's {size:,}", down / size, 1.05)


def learning(artifacts: Path, seeds: list[int]) -> None:
    """What 400 steps of 16 texts of the real task teach, whatever the precision of the weights."""
    from fedtune.data import PartitionSpec, load_icd10
    from fedtune.edge.artifacts import EdgeArtifacts
    from fedtune.edge.tokens import EdgeTokenizer
    from fedtune.train.trainer import LocalPlan

    data = load_icd10(partition=PartitionSpec.parse("iid"), clients=1, seed=0)
    found = EdgeArtifacts(artifacts)
    tokenizer = EdgeTokenizer(found, TOKENS)
    train, test = tokenizer.prepare(data.clients[0].train), tokenizer.prepare(data.test)
    reached: dict[str, list[float]] = defaultdict(list)
    for seed in seeds:
        for precision in ("float32", "int8"):
            rng = np.random.default_rng(seed)
            batches = (rng.choice(len(train), 16, replace=False) for _ in range(400))
            rates = iter(np.linspace(5e-3, 0, 400, endpoint=False))
            trainer = make(f"stepgraph/{precision}", artifacts)
            trained = trainer.train(found.initial(), train, LocalPlan(batches, rates, seed))
            reached[precision].append(100 * trainer.evaluate(trained.adapter, test).accuracy)
    print(f"\n| weights | accuracy, %, seeds {seeds} | mean |\n|---|---|---|")
    for precision, values in reached.items():
        each = ", ".join(f"{value:.1f}" for value in values)
        print(f"| {precision} | {each} | {statistics.mean(values):.1f} |")
    lost = statistics.mean(reached["float32"]) - statistics.mean(reached["int8"])
    aim("points lost by int8", lost, 1.0)


def sizes(pythons: dict[str, Path]) -> None:
    """What is installed, without compiled copies of sources."""
    print("\n| environment | installed MB |\n|---|---|")
    for name in ("edge", "edge-plain"):
        library = next((pythons[name].parents[1] / "lib").glob("python*/site-packages"))
        files = [f for f in library.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
        size = sum(file.stat().st_size for file in files) / 1e6
        print(f"| {name} | {size:.0f} |")
        aim(f"installed for {name}", size, 150, " MB")
    torch = sum(map(installed, closure(["torch", "transformers", "peft", "dp-accounting", "flwr"])))
    print(f"| fedtune[torch,privacy] | {torch / 1e6:.0f} |")


def closure(names: list[str]) -> set[str]:
    """Distributions that these need, as they are installed here."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: set[str] = set()
    todo = [
        *names,
        *(Requirement(r).name for r in metadata.requires("fedtune") or [] if ";" not in r),
    ]
    while todo:
        name = canonicalize_name(todo.pop())
        if name in found:
            continue
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        for text in needs:
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                todo.append(need.name)
    return found


def installed(name: str) -> int:
    """Bytes of a distribution's files."""
    files = metadata.distribution(name).files or []
    paths = [Path(str(file.locate())) for file in files if "__pycache__" not in file.parts]
    return sum(path.stat().st_size for path in paths if path.is_file())


if __name__ == "__main__":
    main()
