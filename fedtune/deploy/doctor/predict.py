"""What a job will take of a machine's memory and disk, before anything is loaded.

The model is looked at without its weights. Measured against the prediction:
`tests/e2e/test_doctor.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from fedtune.adapter.lora import adapter_manifest
from fedtune.adapter.parts import shared_manifest
from fedtune.base.causal import causal_outline
from fedtune.base.classifier import outline
from fedtune.base.loading import longest_text, transformers_config
from fedtune.config import Config
from fedtune.deploy.doctor.findings import Verdict
from fedtune.deploy.doctor.machine import NETWORK_PROCESS
from fedtune.resources import resident_memory
from fedtune.simulation.job import lora_of
from fedtune.train.task import TASKS

_FLOAT = 4  # bytes
_MIB = 1 << 20
# What glibc's allocator keeps of freed activations: measured 2.0 to 2.6 times what is in use.
FRAGMENTATION = 2.5
# Vectors of the adapter that a site holds at a time. float32: value, gradient and two moments;
# what came, what was trained, and their difference. int64: the integers and their masks.
_SITE_VECTORS = 7 * _FLOAT + 3 * 8
# At the server, float32: value and gradient, two moments, best and last; float64 and int64: sums.
_SERVER_VECTORS = 6 * _FLOAT + 4 * 8
_LOGITS = 2  # copies
_SUPERLINK_PROCESS = 180 * _MIB
_REPORT = 32 * _MIB  # report, TensorBoard's events, metrics and logs of a run


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a base model and of the adapter on it."""

    base: int  # parameters
    adapter: int  # parameters
    shared: int  # those of the adapter's that travel
    hidden: int
    layers: int
    intermediate: int
    longest: int  # tokens of the longest text that is not cut
    outputs: int = 0  # logits of each token, of a language model
    evaluated_at_once: int = 64  # rows


def look_at(folder: Path, config: Config) -> Verdict[ModelShape]:
    """What `shape_of` finds, for the report."""
    shape = shape_of(folder, config)
    text = f"{shape.base:,} parameters, and an adapter of {shape.adapter:,}"
    numbers = {"base_parameters": shape.base, "adapter_parameters": shape.adapter}
    return Verdict("ok", text, numbers=numbers, value=shape)


def shape_of(folder: Path, config: Config) -> ModelShape:
    """The shape of the base model in `folder`; raises `BaseModelError` or `ConfigError`."""
    module: nn.Module
    if causal := config.base.task == "causal-lm":
        module = causal_outline(folder)
        frozen = module
    else:
        module = outline(folder, len(config.data.labels), config.base.pooling)
        frozen = module.encoder
    base = sum(parameter.numel() for parameter in frozen.parameters())
    found = transformers_config(module)
    adapter = adapter_manifest(module, lora_of(config))
    return ModelShape(
        base,
        adapter.size,
        shared_manifest(config.adapter.private, adapter).size,
        found.hidden_size,
        getattr(found, "num_hidden_layers", 0),
        getattr(found, "intermediate_size", 4 * found.hidden_size),
        min(config.base.max_length, longest_text(found)),
        found.vocab_size if causal else 0,
        TASKS[config.base.task].evaluated_at_once,
    )


def activations(shape: ModelShape, rows: int, tokens: int) -> int:
    """Bytes that a training step keeps of a batch of `rows` texts of `tokens` each.

    rows · tokens · (layers · (7 · hidden + intermediate) + 2 · outputs) · 4 bytes. Of each token
    and layer, a model with a frozen base keeps for the way back: the input of both normalizations,
    the layer's input (for LoRA), query, key, value, the attention's output, and what goes into the
    activation function. The attention's own matrices are not kept by torch's fused kernels. Of a
    language model's logits there are also the logarithms of their probabilities.
    """
    values = shape.layers * (7 * shape.hidden + shape.intermediate)
    return rows * tokens * (values + _LOGITS * shape.outputs) * _FLOAT


def process_memory() -> int:
    """Bytes that a process holds which has imported what trains: this one, where it is known."""
    return resident_memory() or 450 * _MIB


def site_memory(config: Config, shape: ModelShape, tokens: int, process: int) -> int:
    """Bytes of memory of both processes of a site, at their peak.

    process + base · 4 + adapter · 52 + 2.5 · activations + 120 MiB. `process` is what a process
    holds that has imported what trains, `tokens` the longest row's, at most base.max-length.
    With record-level privacy a step takes one row at a time. Without gradients, nothing is kept of
    a layer that is passed.
    """
    rows = 1 if config.privacy.unit == "record" else config.train.batch_size
    kept = int(FRAGMENTATION * activations(shape, rows, tokens))
    if config.train.method == "forward-only":
        kept //= max(1, shape.layers)
    model = shape.base * _FLOAT + shape.adapter * _SITE_VECTORS
    return process + model + kept + NETWORK_PROCESS


def server_memory(shape: ModelShape, clients: int, process: int, evaluates: bool) -> int:
    """Bytes of memory of both processes of a server of `clients`, at their peak.

    process + base · 4 + adapter · (56 + 4 · (clients + 1)) + 180 MiB, and to evaluate one layer's
    activations of 64 rows of base.max-length (8 of a language model). The SuperLink holds one
    adapter for all and at worst every client's update; above 1 GiB they are on the disk.
    """
    model = shape.base * _FLOAT + shape.adapter * _SERVER_VECTORS
    messages = min(shape.adapter * _FLOAT * (clients + 1), 1 << 30)
    once = replace(shape, layers=1)
    one_layer = activations(once, shape.evaluated_at_once, shape.longest)
    passing = int(FRAGMENTATION * one_layer) if evaluates else 0
    return process + model + messages + passing + _SUPERLINK_PROCESS


def server_disk(shape: ModelShape, clients: int) -> int:
    """Bytes of a run's folder.

    adapter · (4 · 9 + 8 · 2), 32 MiB, and where messages are not held in memory, they. The
    journal keeps the first, the best and the last adapter, two moments, and while a round is
    opened its sum; SQLite writes what changes once more; the adapter's own file is replaced by
    writing another.
    """
    messages = shape.adapter * _FLOAT * (clients + 1)
    return shape.adapter * (_FLOAT * 9 + 8 * 2) + _REPORT + (messages if messages > 1 << 30 else 0)
