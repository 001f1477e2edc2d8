"""What several rooms' tests share: a real base model, a small real federation, real processes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from fedtune.adapter.lora import AttachedAdapter
    from fedtune.base.classifier import BaseModel, EncoderClassifier
    from fedtune.config import Config
    from fedtune.round.client import ClientMachine
    from fedtune.simulation.job import TextModel
    from fedtune.train.torch_trainer import TorchTrainer

ROOT = Path(__file__).resolve().parent.parent

# The machine's load decides how long an example takes, so no deadline for a single one.
settings.register_profile("fedtune", deadline=None, max_examples=60)
settings.load_profile("fedtune")

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository under test."""
    return ROOT


@pytest.fixture(scope="session")
def child_environment() -> dict[str, str]:
    """The environment of a child process that imports this very tree."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def run_python(child_environment: dict[str, str]) -> RunPython:
    """Run Python code in a child process; its output is text."""

    def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=child_environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def minilm() -> BaseModel:
    """The packaged MiniLM. Never attach an adapter to its own encoder: see `fresh_classifier`."""
    import torch

    from fedtune.base.classifier import BaseModel

    torch.set_num_threads(1)
    return BaseModel("all-MiniLM-L6-v2")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_tiny_base`."""
    from tiny_base import write_tiny_base

    return write_tiny_base(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """See `write_tiny_decoder`."""
    from tiny_decoder import write_tiny_decoder

    return write_tiny_decoder(tmp_path_factory.mktemp("models") / "tiny-llama", texts)


@pytest.fixture(scope="session")
def easy_vqa_texts() -> list[str]:
    """Questions and answers of easy-VQA, for a tokenizer that has a token for each answer."""
    from fedtune.data import PartitionSpec
    from fedtune.data.easy_vqa import load_easy_vqa

    data = load_easy_vqa(partition=PartitionSpec("iid"), clients=1, seed=0)
    return [*data.clients[0].train.questions[:300], *(f" {a}" for a in data.answers * 50)]


@pytest.fixture(scope="session")
def answering_decoder(tmp_path_factory: pytest.TempPathFactory, easy_vqa_texts: list[str]) -> Path:
    """A tiny decoder that has a token for each answer of easy-VQA."""
    from tiny_decoder import write_tiny_decoder

    return write_tiny_decoder(tmp_path_factory.mktemp("models") / "answering", easy_vqa_texts, 600)


@pytest.fixture(scope="session")
def deep_decoder(tmp_path_factory: pytest.TempPathFactory, easy_vqa_texts: list[str]) -> Path:
    """The same with six layers."""
    from tiny_decoder import write_tiny_decoder

    return write_tiny_decoder(tmp_path_factory.mktemp("models") / "deep", easy_vqa_texts, 600, 6)


@pytest.fixture(scope="session")
def split_keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of a server at the loopback address, as `fedtune keys server` makes them."""
    from fedtune.deploy.keys import make_server_keys

    folder = tmp_path_factory.mktemp("keys") / "server-keys"
    make_server_keys(folder, ["127.0.0.1"])
    return folder


@pytest.fixture(scope="session")
def decoder(tiny_decoder: Path) -> Any:
    """The small decoder with answers, as a server of a base model has it."""
    from split_service import load_decoder

    return load_decoder(tiny_decoder)


@pytest.fixture(scope="session")
def terms(decoder: Any) -> Any:
    """What a client and a server of `decoder` agree on."""
    from split_service import FEDERATION

    from fedtune.split.server import terms_of

    return terms_of(decoder, FEDERATION, "float32")


@pytest.fixture(scope="session")
def build_artifacts() -> Callable[..., Any]:
    """Build edge artifacts of a configuration; the model of which they were made."""
    from fedtune.config import parse_config
    from fedtune.edge.build.artifacts import build
    from fedtune.edge.build.model import EdgeModel
    from fedtune.simulation.job import TextModel

    def make(out: Path, *overrides: str) -> tuple[Config, TextModel]:
        labels = 'data.labels=["a","b","c"]'
        config = parse_config("", "test", [labels, "base.max-length=64", *overrides])
        model = TextModel(config, len(config.data.labels))
        parts = EdgeModel(model.base, model.adapter, model.pad_id, model.max_length)
        build(config, parts, out, lambda _text: None)
        return config, model

    return make


@pytest.fixture(scope="session")
def edge_python() -> Path:
    """The Python of a device that trains with ONNX Runtime's training build."""
    from edge_environment import python_of

    return python_of("edge")


@pytest.fixture(scope="session")
def edge_plain_python() -> Path:
    """The Python of a device that has ONNX Runtime without training."""
    from edge_environment import python_of

    return python_of("edge-plain")


@pytest.fixture(scope="session")
def edge_nano_python() -> Path:
    """The Python of a device that has NanoAdapters, and ONNX Runtime without training."""
    from edge_environment import python_of

    return python_of("edge-plain", "edge-nano")


@pytest.fixture(scope="session")
def decoder_artifacts(
    build_artifacts: Callable[..., Any],
    tiny_decoder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Config, TextModel]:
    """Edge artifacts of the tiny decoder, and what they were made of. Do not write to them."""
    out = tmp_path_factory.mktemp("decoder") / "artifacts"
    own = ("data.labels=[]", f'base.path="{tiny_decoder}"', "base.task=causal-lm")
    return out, *build_artifacts(out, *own, "adapter.rank=4", "base.max-length=40")


@pytest.fixture(scope="session")
def fresh_classifier(minilm: BaseModel) -> Callable[..., EncoderClassifier]:
    """A classifier over a copy of MiniLM, because peft changes a module in place."""
    from fedtune.base.classifier import EncoderClassifier

    def make(labels: int = 3, pooling: Any = "mean") -> EncoderClassifier:
        return EncoderClassifier(copy.deepcopy(minilm.encoder), labels, pooling)

    return make


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Short texts of many lengths."""
    words = [
        "fracture",
        "of",
        "the",
        "left",
        "femur",
        "acute",
        "renal",
        "failure",
        "with",
        "sepsis",
    ]
    rng = np.random.default_rng(5)
    return [" ".join(rng.choice(words, 1 + i % 17)) for i in range(80)]


@dataclass(frozen=True)
class SmallFederation:
    """A federation over a linear model of 4 inputs, 3 classes: real trainer, real adapter."""

    config: Config
    attached: AttachedAdapter
    trainer: TorchTrainer
    machines: list[ClientMachine]
    examples: list[int]


@pytest.fixture(scope="session")
def small_federation() -> Callable[..., SmallFederation]:
    """Make a small federation; `overrides` are config overrides, `sizes` the clients' rows."""
    import torch
    from torch import nn

    from fedtune.adapter.lora import LoRA, attach_lora
    from fedtune.config import parse_config
    from fedtune.round.client import ClientMachine
    from fedtune.train.task import CustomTask, Rows
    from fedtune.train.torch_trainer import TorchSettings, TorchTrainer
    from fedtune.update import make_pipeline

    torch.set_num_threads(1)

    def make(*overrides: str, sizes: tuple[int, ...] = (7, 12, 5), tests: int = 6) -> Any:
        defaults = ("train.steps=3", "train.batch-size=4", "rounds.count=3", "train.lr=0.05")
        config = parse_config("", "test", [*defaults, *overrides])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            module = nn.Sequential()
            module.add_module("inner", nn.Linear(4, 5))
            module.add_module("head", nn.Linear(5, 3))
        lora = LoRA(rank=2, alpha=4.0, targets=("inner",), also_train=("head",))
        attached = attach_lora(module, lora, config.seed)
        trainer = TorchTrainer(
            attached, CustomTask(), "ab" * 32, TorchSettings(config.train.optimizer)
        )
        rng = np.random.default_rng(3)

        def rows(n: int) -> Rows:
            inputs = rng.normal(size=(n, 4)).astype(np.float32)
            return Rows([(torch.from_numpy(x), int(abs(x[0]) * 10) % 3) for x in inputs])

        machines = [
            ClientMachine(
                f"client-{place}",
                config,
                trainer,
                rows(n),
                rows(tests) if tests else None,
                make_pipeline(config.update, config.values_sent(attached.manifest.size)),
            )
            for place, n in enumerate(sizes)
        ]
        return SmallFederation(config, attached, trainer, machines, list(sizes))

    return make


@pytest.fixture
def forked() -> Iterator[Callable[[Callable[[], None]], int]]:
    """Run a function in a forked child and return its wait status; 0 when it simply returned."""

    def run(function: Callable[[], None]) -> int:
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                function()
                status = 0
            finally:
                os._exit(status)
        return os.waitpid(pid, 0)[1]

    return run


@pytest.fixture
def masked_federation(
    small_federation: Callable[..., SmallFederation], tmp_path: Path
) -> Iterator[Callable[..., Any]]:
    """Make a `unit.round.masked_run.MaskedFederation`; its files are in `tmp_path`.

    `overrides` are config overrides on top of `base` (masks by default), `sizes` the clients'
    rows; whatever else is passed on.
    """
    from unit.round.masked_run import MASKED, SIZES, MaskedFederation

    made: list[MaskedFederation] = []

    def make(
        *overrides: str,
        base: tuple[str, ...] = MASKED,
        sizes: tuple[int, ...] = SIZES,
        folder: str = ".",
        **more: Any,
    ) -> MaskedFederation:
        (tmp_path / folder).mkdir(exist_ok=True)
        small = small_federation(*base, *overrides, sizes=sizes)
        made.append(MaskedFederation(small, tmp_path / folder, **more))
        return made[-1]

    yield make
    for federation in made:
        federation.close()
