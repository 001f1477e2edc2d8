"""A base model behind a cut: what a client holds, what passes, how fast, and what is learned.

    python benchmarks/nano.py
    python benchmarks/nano.py --learning --seeds 0 1 2

Without `--learning`: SmolLM2-135M at a server process, over TLS on the loopback. Sizes of what a
client has; peak memory of a client's training process with the decoder at the server and with its
own; requests of four clients together and one after another; and one client's steps beside those
of the whole model in one process, which take turns. With `--learning`: the preset, with other rules
and without a federation, on as many examples. A rule takes about seven minutes a seed on two cores,
and the references twice that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tomli_w
from nano_part import BATCH, THREADS

ROOT = Path(__file__).resolve().parents[1]
CLIENTS, TOKENS, REQUESTS, TURNS = 4, 40, 12, 3
ROWS = 64
RULES = {
    "fedavg": ["aggregate.rule=fedavg"],
    "fedprox": ["aggregate.rule=fedavg", "train.proximal=0.1"],
    "fisher": ["aggregate.rule=fisher"],
}


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--learning", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rules", choices=RULES, nargs="+", default=list(RULES))
    parser.add_argument("--port", type=int, default=19494)
    args = parser.parse_args()
    if args.learning:
        learning(args.seeds, args.rules)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, args.port)
        sizes(folder)
        with serving(folder, args.port):
            memory(folder)
            throughput(folder)
            one_client(folder)


def prepare(folder: Path, port: int) -> None:
    """A federation with keys, a kit and sites; `whole.toml` has the decoder at sites."""
    from fedtune.base.causal import CausalBase
    from fedtune.base.kit import write_kit
    from fedtune.base.vision import VisionEncoder
    from fedtune.config import PRESETS, read_toml
    from fedtune.data import PartitionSpec
    from fedtune.data.easy_vqa import load_easy_vqa
    from fedtune.deploy.keys import make_roster, make_server_keys, make_site_keys
    from fedtune.deploy.site_files import CLIENT_TEMPLATE
    from fedtune.simulation.vision import train_connector
    from fedtune.train.question_rows import PROMPT

    data = load_easy_vqa(partition=PartitionSpec("iid"), clients=CLIENTS, seed=0)
    federation = read_toml(PRESETS / "vqa.toml")
    federation["data"] = {"labels": list(data.answers)}
    federation["train"]["threads"] = THREADS
    federation["split"]["activations"] = "float32"
    base = CausalBase(federation["base"]["path"])
    connector = folder / "connector.safetensors"
    train_connector(base, VisionEncoder(), data.public, connector)
    federation["base"]["connector"] = str(connector)
    (folder / "federation.toml").write_text(tomli_w.dumps(federation))
    federation["base"]["placement"] = "client"
    (folder / "whole.toml").write_text(tomli_w.dumps(federation))
    (folder / "server.toml").write_text(tomli_w.dumps({"server": {"host": "127.0.0.1"}}))
    questions = {question for client in data.clients for question in client.train.questions}
    texts = [PROMPT.format(question=question) for question in questions]
    write_kit(folder / "kit", base, connector, texts)
    make_server_keys(folder / "server-keys", ["127.0.0.1"])
    public = []
    for client in data.clients:
        site = folder / client.name
        site.mkdir()
        rows = [
            {
                "question": client.train.questions[row],
                "answer": data.answers[client.train.labels[row]],
                "image": str(client.train.files[client.train.images[row]]),
            }
            for row in range(ROWS)
        ]
        (site / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        public.append(make_site_keys(site / "keys", client.name))
        text = CLIENT_TEMPLATE.format(
            name=client.name,
            server="127.0.0.1:9092",
            federation="../federation.toml",
            roster="../roster.toml",
            certificate="../server-keys/ca.crt",
        ).replace("train.csv", "train.jsonl")
        text = text.replace("[site]\n", f'[site]\nbase-server = "127.0.0.1:{port}"\n')
        machine = f'[machine]\nkit = "../kit"\nthreads = {THREADS}'
        text = text.replace("[machine]\nthreads = 1", machine)
        text = text.replace("[policy]\n", "[policy]\nmax-token-epsilon = inf\n")
        (site / "client.toml").write_text(text)
        (site / "whole.toml").write_text(text.replace("../federation.toml", "../whole.toml"))
    make_roster(folder / "roster.toml", folder / "server-keys", public)


@contextmanager
def serving(folder: Path, port: int) -> Iterator[None]:
    """The base model in a process of its own."""
    command = [sys.executable, ROOT / "benchmarks" / "nano_part.py", "server", folder, port]
    process = subprocess.Popen(
        [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise SystemExit("the server of the base model did not start")
        yield
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def sizes(folder: Path) -> None:
    """What a client has on its disk, and what it sends, beside the whole model."""
    from fedtune.adapter.nano import Nano
    from fedtune.base.causal import CausalBase
    from fedtune.base.kit import ClientKit
    from fedtune.base.vision import VisionEncoder
    from fedtune.config import load_config

    kit, encoder = ClientKit(folder / "kit"), VisionEncoder()
    config = load_config(folder / "federation.toml")
    decoder = CausalBase(config.base.path)
    whole = 4 * decoder.parameters + encoder.size
    rank, width = Nano(config.adapter.rank).rank, kit.table().embedding_dim
    adapter = 2 * (2 * width * rank + rank + width)
    print("| on a client's disk | MB |\n|---|---|")
    for name in sorted(kit.manifest.files):
        print(f"| kit: {name} | {(folder / 'kit' / name).stat().st_size / 1e6:.2f} |")
    print(f"| image encoder | {encoder.size / 1e6:.2f} |")
    print(f"| together | {(kit.size + encoder.size) / 1e6:.2f} |")
    print(f"| the whole model in float32, with the encoder | {whole / 1e6:.1f} |\n")
    aim("storage of a client without its encoder, of the whole model", kit.size / whole, 0.05)
    aim("the same with the encoder", (kit.size + encoder.size) / whole, 0.05)
    sent = config.values_sent(adapter)
    print(
        f"an adapter of {adapter:,} values; {sent:,} go up in a round, "
        f"{100 * sent / decoder.parameters:.3f} % of {decoder.parameters:,} parameters\n"
    )


def memory(folder: Path) -> None:
    """Peak memory of a client's training process, three times, taking turns."""
    found: dict[str, list[dict[str, float]]] = {"client": [], "server": []}
    site = folder / "site-1"
    for _ in range(TURNS):
        for placement, file in (("client", "whole.toml"), ("server", "client.toml")):
            command = [sys.executable, ROOT / "benchmarks" / "nano_part.py", "client", site / file]
            done = subprocess.run(
                [str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True
            )
            found[placement].append(json.loads(done.stdout.splitlines()[-1]))
    print("| base.placement | peak RSS MiB | lowest to highest | ms of a step of 8 |")
    print("|---|---|---|---|")
    for placement, values in found.items():
        peaks = [value["peak"] for value in values]
        step = statistics.median(value["ms"] for value in values)
        spread = f"{min(peaks):.0f} to {max(peaks):.0f}"
        print(f"| {placement} | {statistics.median(peaks):.0f} | {spread} | {step:.0f} |")
    peak = {name: statistics.median(v["peak"] for v in values) for name, values in found.items()}
    aim("peak memory of a client, of one with the decoder", peak["server"] / peak["client"], 0.35)


def throughput(folder: Path) -> None:
    """Requests of one example of 40 tokens: four clients one after another, and together."""
    rng = np.random.default_rng(0)
    bases = [_remote(folder / f"site-{number}" / "client.toml") for number in range(1, CLIENTS + 1)]
    width = bases[0][1]
    example = rng.normal(0, 0.1, (1, TOKENS, width)).astype(np.float32)
    length, label = np.array([TOKENS]), np.array([0])

    def ask(number: int, requests: int) -> None:
        for _ in range(requests):
            bases[number][0].differentiate(example, length, label)

    for number in range(CLIENTS):
        ask(number, 1)
    alone, together = [], []
    for _ in range(TURNS):
        alone.append(_seconds(lambda: [ask(number, REQUESTS) for number in range(CLIENTS)]))
        together.append(_seconds(lambda: _at_once(ask)))
    for base, _ in bases:
        base.close()
    total = CLIENTS * REQUESTS
    print("\n| four clients, 40 tokens a request | examples a second | lowest to highest |")
    print("|---|---|---|")
    for name, times in (("one after another", alone), ("together", together)):
        rates = [total / seconds for seconds in times]
        spread = f"{min(rates):.2f} to {max(rates):.2f}"
        print(f"| {name} | {statistics.median(rates):.2f} | {spread} |")
    gain = statistics.median(a / b for a, b in zip(alone, together, strict=True))
    aim("gain by sharing batches", gain, 1.6, least=True)


def one_client(folder: Path) -> None:
    """Steps of one client over TLS beside those of the whole model, turn by turn."""
    import torch

    from fedtune.deploy.site_files import SiteFiles
    from fedtune.deploy.vision_site import load_questions
    from fedtune.train.trainer import LocalPlan

    sites = {
        name: load_questions(SiteFiles.read(folder / "site-1" / file))
        for name, file in (("client", "whole.toml"), ("server", "client.toml"))
    }
    torch.set_num_threads(THREADS)
    times: dict[str, list[float]] = {name: [] for name in sites}
    for step in range(REQUESTS):
        rows = np.arange(BATCH) + BATCH * (step % (ROWS // BATCH))
        for name, site in sites.items():
            adapter = np.zeros(site.trainer.manifest.size, np.float32)
            plan = LocalPlan(iter([rows]), iter([1e-3]), 0)
            times[name].append(
                _seconds(lambda s=site, a=adapter, p=plan: s.trainer.train(a, s.train, p))
            )
    print("\n| a step of 8 questions | ms | lowest to highest |\n|---|---|---|")
    for name, found in times.items():
        ms = [1000 * seconds for seconds in found[2:]]
        print(
            f"| placement {name} | {statistics.median(ms):.0f} | {min(ms):.0f} to {max(ms):.0f} |"
        )
    pairs = zip(times["server"][2:], times["client"][2:], strict=True)
    aim("time over the cut, of the whole model's", statistics.median(a / b for a, b in pairs), 1.3)


def learning(seeds: list[int], rules: list[str]) -> None:
    """Accuracy of the preset by rule, and of its references, which are trained with the last."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for seed in seeds:
            for rule in rules:
                overrides = RULES[rule]
                run = Path(name) / f"{rule}-{seed}"
                sets = [part for override in overrides for part in ("--set", override)]
                more = ["--references"] * (rule == rules[-1])
                command = [Path(sys.executable).with_name("fedtune"), "simulate", "--preset", "vqa"]
                command += ["--seed", seed, "--out", run, "--json", *sets, *more]
                done = subprocess.run(
                    [str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True
                )
                summary = json.loads(done.stdout.splitlines()[-1])
                found.setdefault(rule, []).append(summary["final"]["accuracy"])
                for reference in summary["references"]:
                    values = found.setdefault(reference["name"], [])
                    if len(values) < len(found[rule]):
                        values.append(reference["accuracy"])
                print(f"seed {seed}, {rule}: {found[rule][-1]:.1%}", flush=True)
    central = statistics.mean(found["centralized"])
    print(f"\nseeds {seeds}\n\n| training | right answers | lowest to highest | of centralized |")
    print("|---|---|---|---|")
    for name, values in found.items():
        mean = statistics.mean(values)
        spread = f"{min(values):.1%} to {max(values):.1%}"
        print(f"| {name} | {mean:.1%} | {spread} | {mean / central:.1%} |")
    share = statistics.mean(found[rules[-1]]) / central
    aim(f"{rules[-1]}, of centralized", share, 0.97, least=True)


def aim(what: str, value: float, limit: float, least: bool = False) -> None:
    """Say whether an aim is reached."""
    verdict = "PASS" if (value >= limit if least else value <= limit) else "MISS"
    print(f"{verdict} {what}: {value:.3g}, at {'least' if least else 'most'} {limit}")


def _remote(path: Path) -> tuple[object, int]:
    """A site's connection to the base model, and the width of an embedding."""
    from fedtune.base.answering import first_tokens
    from fedtune.deploy.base_link import connect_base
    from fedtune.deploy.site_files import SiteFiles
    from fedtune.deploy.vision_site import read_kit

    files = SiteFiles.read(path)
    kit = read_kit(files)
    tokens = first_tokens(kit.tokenizer(), files.federation.data.labels).tolist()
    width = kit.table().embedding_dim
    return connect_base(files, kit.manifest.base_digest, tokens, width), width


def _at_once(ask: Callable[[int, int], None]) -> None:
    threads = [threading.Thread(target=ask, args=(n, REQUESTS)) for n in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
