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
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
ROWS, TOKENS, WARM, STEPS, THREADS = 8, 64, 2, 10, 2
KINDS = {
    "torch": "torch",
    "ort/float32": "edge",
    "ort/int8": "edge",
    "stepgraph/float32": "edge-plain",
    "stepgraph/int8": "edge-plain",
    "inference/float32": "edge-plain",
    "inference/int8": "edge-plain",
}


def main() -> None:
    """Measure everything and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environments", type=Path, default=Path("/var/tmp/fedtune-edge"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--port", type=int, default=19292)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], Path(args.one[1]))))
        return
    pythons = {name: environment(args.environments, name) for name in ("edge", "edge-plain")}
    pythons["torch"] = Path(sys.executable)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "federation"
        artifacts = prepare(folder, args.port)
        steps(artifacts, pythons, args.repeats)
        clients(folder, pythons)
    sizes(pythons)


def prepare(folder: Path, port: int) -> Path:
    """A federation of three hospitals with long texts, and its artifacts."""
    from deployed import FEDTUNE
    from deployed import prepare as init

    settings = {"rounds.count": "2", "train.steps": "5", "train.batch-size": str(ROWS)}
    init(folder, 3, port, settings | {"base.max-length": str(TOKENS)})
    for file in folder.glob("sites/*/train.csv"):
        head, *lines = file.read_text().splitlines()
        # Each text with itself, until it is longer than what is not cut.
        longer = [re.sub(r'^"?(.*?)"?,', lambda m: f'"{" ".join([m[1]] * 30)}",', x) for x in lines]
        file.write_text("\n".join([head, *longer]) + "\n")
    out = folder / "artifacts"
    command = [FEDTUNE, "edge", "build", folder / "federation.toml", "-o", out]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    return out


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
            command = [pythons[where], __file__, "--one", kind, artifacts]
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


def _ratio(found: dict[str, list[dict[str, float]]], one: str, other: str, key: str) -> float:
    """The median of the ratios within each turn."""
    pairs = zip(found[one], found[other], strict=True)
    return statistics.median(a[key] / b[key] for a, b in pairs)


def aim(what: str, value: float, limit: float, unit: str = "") -> None:
    """Say whether an aim is reached."""
    verdict = "PASS" if value <= limit else "MISS"
    print(f"{verdict} {what}: {value:.3g}{unit}, at most {limit}{unit}")


def measure(kind: str, artifacts: Path) -> dict[str, float]:
    """Train, or infer, on one batch; median milliseconds of a step, and the peak in MiB."""
    from fedtune.resources import peak_memory
    from fedtune.train.texts import TokenizedTexts
    from fedtune.train.trainer import LocalPlan

    rng = np.random.default_rng(0)
    data = TokenizedTexts.of(
        rng.integers(1000, 20_000, (ROWS, TOKENS)).tolist(), rng.integers(0, 20, ROWS)
    )
    rows = np.arange(ROWS)
    trainer = make(kind, artifacts)
    adapter = np.zeros(trainer.manifest.size, np.float32)
    times = []
    for _ in range(WARM + STEPS):
        started = time.perf_counter()
        if kind.startswith("inference"):
            trainer.evaluate(adapter, data)
        else:
            trainer.train(adapter, data, LocalPlan(iter([rows]), iter([1e-3]), 0))
        times.append(1000 * (time.perf_counter() - started))
    return {"ms": statistics.median(times[WARM:]), "peak": peak_memory() / 2**20}


def make(kind: str, artifacts: Path) -> Any:
    """The trainer of one kind."""
    if kind == "torch":
        import torch

        from fedtune.config import load_config
        from fedtune.simulation.job import TextModel, torch_settings
        from fedtune.train.torch_trainer import TorchTrainer

        torch.set_num_threads(THREADS)
        config = load_config(artifacts.parent / "federation.toml")
        model = TextModel(config, len(config.data.labels))
        settings = torch_settings(config.train)
        return TorchTrainer(model.adapter, model.task, model.base.digest, settings)
    from fedtune.edge.artifacts import EdgeArtifacts
    from fedtune.edge.devices import make_trainer
    from fedtune.edge.trainer import EdgeSettings, EdgeTrainer, ForwardModel

    runtime, _, precision = kind.partition("/")
    found = EdgeArtifacts(artifacts)
    if runtime == "inference":
        from fedtune.edge.runtime import use_little_memory

        use_little_memory()
        forward = ForwardModel(artifacts / precision / "forward.onnx", found.tensors, THREADS)
        nothing: Any = None
        return EdgeTrainer(found.tensors, "", 0, nothing, forward, EdgeSettings())
    chosen: Any = (runtime, precision)
    return make_trainer(found, *chosen, THREADS, EdgeSettings())


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
        for site in environment_of:
            for words, size in sizes(processes[site].pid):
                peaks[site][words] = max(peaks[site].get(words, 0.0), size)
        time.sleep(0.1)
    if any(process.returncode for process in processes.values()):
        raise SystemExit((folder / "server.log").read_text())
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
