"""A real model on devices: as PyTorch has it, on a real task, in memory that the kernel limits."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from edge_environment import ROOT

from fedtune.data import FederatedData, PartitionSpec, load_icd10
from fedtune.edge.artifacts import EdgeArtifacts, Precision
from fedtune.edge.devices import make_trainer
from fedtune.edge.tokens import EdgeTokenizer
from fedtune.edge.trainer import EdgeSettings
from fedtune.edge.verify import verify
from fedtune.train.trainer import LocalPlan

RUNTIMES = ["ort", "stepgraph"]
ROWS, TOKENS = 32, 64
BUDGET_MB = 200  # resident
LIMIT_MB = 320  # of the kernel, which also counts what is reserved and never touched
STEPS = 70
WORDS = (
    *("acute", "renal", "failure", "with", "sepsis", "after", "a", "fracture", "of", "the"),
    *("left", "femur"),
)

# What `fedtune client` starts on a device to train, without the network: a site's files are
# loaded, and a batch of long texts is trained on twice.
_DEVICE = """
import json, sys
from pathlib import Path

import numpy as np

from fedtune.config import ClientConfig, Machine, parse_config
from fedtune.data import TextExamples
from fedtune.deploy.edge_site import load
from fedtune.deploy.site_files import SiteFiles
from fedtune.resources import peak_memory
from fedtune.train.trainer import LocalPlan

machine, overrides, rows, words = json.load(sys.stdin)
config = parse_config("", "test", overrides)
client = ClientConfig(machine=Machine.model_validate(machine))
texts = tuple(" ".join(words[i % 5 :] + words[: i % 5]) for i in range(rows))
examples = TextExamples(texts, np.arange(rows, dtype=np.int64) % len(config.data.labels))
site = load(SiteFiles(Path("client.toml"), client, config), examples, None)
batches, rates = iter([np.arange(rows)] * 2), iter([1e-3] * 2)
start = np.full(site.trainer.manifest.size, 0.01, np.float32)
trained = site.trainer.train(start, site.train, LocalPlan(batches, rates, 0))
print(json.dumps({
    "peak": peak_memory(),
    "words": site.words,
    "moved": (trained.adapter - start)[::97].tolist(),
    "modules": sorted({name.partition(".")[0] for name in sys.modules}),
}))
"""


@pytest.fixture(scope="module")
def data() -> FederatedData:
    """The packaged task: what chapter of ICD-10-CM a text is of."""
    return load_icd10(partition=PartitionSpec.parse("iid"), clients=1, seed=0)


@pytest.fixture(scope="module")
def overrides(data: FederatedData) -> list[str]:
    """Of the federation's configuration."""
    return [
        f"data.labels={json.dumps(data.labels)}",
        f"base.max-length={TOKENS}",
        f"train.batch-size={ROWS}",
        "train.optimizer=sgd",
    ]


@pytest.fixture(scope="module")
def artifacts(
    build_artifacts: Callable[..., Any],
    overrides: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Artifacts of MiniLM. Do not write to them."""
    out = tmp_path_factory.mktemp("edge") / "artifacts"
    build_artifacts(out, *overrides)
    return out


def test_it_is_as_torch_has_it_on_both_runtimes(artifacts: Path) -> None:
    """All comparisons after 1, 10 and 50 steps; base.bin is what it was before."""
    checks = list(verify(EdgeArtifacts(artifacts)))
    assert [check.what for check in checks if not check.passed] == []
    names = {check.what for check in checks}
    for runtime in RUNTIMES:
        for optimizer in ("sgd", "adamw"):
            assert {f"{runtime} float32: {optimizer}, {n} steps" for n in (1, 10, 50)} <= names


def test_int8_weights_are_the_same_in_all_graphs(artifacts: Path) -> None:
    found = []
    for name in ("training", "step", "forward"):
        model = onnx.load(artifacts / f"int8/{name}.onnx")
        found.append(
            {
                tensor.name: onnx.numpy_helper.to_array(tensor)
                for tensor in model.graph.initializer
                if tensor.data_type == onnx.TensorProto.INT8
            }
        )
    first, *others = found
    assert len(first) == 6 * 6 + 1  # six matrices a layer, and the words
    for other in others:
        assert other.keys() == first.keys()
        for name, value in first.items():
            np.testing.assert_array_equal(other[name], value)
    sizes = [(artifacts / p / "base.bin").stat().st_size for p in ("float32", "int8")]
    assert sizes[1] < 0.27 * sizes[0]


@dataclass(frozen=True)
class Device:
    """One core, and a process whose memory the kernel limits, in an environment without torch."""

    python: Path
    artifacts: Path
    overrides: list[str]

    def train(self, limit: int | None = None, **machine: Any) -> subprocess.CompletedProcess[str]:
        """Train; `limit` is in bytes."""
        machine |= {"artifacts": str(self.artifacts), "precision": "int8"}
        asked = [machine, [*self.overrides, "train.threads=1"], ROWS, WORDS * 8]
        return subprocess.run(
            [self.python, "-c", _DEVICE],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
            preexec_fn=partial(_limit, limit),
        )


def _limit(limit: int | None) -> None:
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
    if limit:  # of what is written to: heap, stacks, anonymous mappings
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


@pytest.fixture(scope="module", params=RUNTIMES)
def device(
    request: pytest.FixtureRequest, artifacts: Path, overrides: list[str]
) -> tuple[Device, str]:
    """A device with each runtime, and the name of that."""
    name = {"ort": "edge_python", "stepgraph": "edge_plain_python"}[request.param]
    return Device(request.getfixturevalue(name), artifacts, overrides), request.param


def _told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_budget_of_memory_is_kept_and_changes_nothing_else(device: tuple[Device, str]) -> None:
    machine, runtime = device
    free = _told(machine.train(runtime=runtime))
    assert free["peak"] > BUDGET_MB * 1e6
    limited = _told(
        machine.train(LIMIT_MB * 1_000_000, runtime=runtime, **{"max-memory-mb": BUDGET_MB})
    )
    assert limited["peak"] < BUDGET_MB * 1e6
    assert "at a time" in limited["words"]
    assert np.abs(free["moved"]).max() > 1e-5
    np.testing.assert_allclose(limited["moved"], free["moved"], atol=2e-7)
    assert not {"torch", "transformers", "onnx"} & set(limited["modules"])


def test_the_limit_is_one(device: tuple[Device, str]) -> None:
    """The same without the budget: the kernel refuses."""
    machine, runtime = device
    done = machine.train(LIMIT_MB * 1_000_000, runtime=runtime)
    assert done.returncode != 0
    assert "alloc" in done.stderr  # of whatever came first


def test_rounded_weights_learn_the_task_as_well(artifacts: Path, data: FederatedData) -> None:
    """To a point of accuracy, with a fifth of the preset's steps."""
    found = EdgeArtifacts(artifacts)
    tokenizer = EdgeTokenizer(found, TOKENS)
    assert data.test is not None
    train, test = tokenizer.prepare(data.clients[0].train), tokenizer.prepare(data.test)
    reached = {}
    precisions: list[Precision] = ["float32", "int8"]
    for precision in precisions:
        rng = np.random.default_rng(0)
        batches = (rng.choice(len(train), 16, replace=False) for _ in range(STEPS))
        rates = iter(np.linspace(5e-3, 0, STEPS, endpoint=False).tolist())
        trainer = make_trainer(found, "stepgraph", precision, 1, EdgeSettings())
        trained = trainer.train(found.initial(), train, LocalPlan(batches, rates, 0)).adapter
        reached[precision] = trainer.evaluate(trained, test).accuracy
    assert reached["float32"] is not None
    assert reached["int8"] is not None
    assert reached["float32"] > 0.6  # one of 21 labels; the commonest is an eighth
    assert reached["int8"] > reached["float32"] - 0.01
