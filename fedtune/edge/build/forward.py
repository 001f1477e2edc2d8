"""The forward graph of a base model with its adapter, exported by torch."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedtune.adapter.lora import AttachedAdapter
from fedtune.edge.build.graph import IR_VERSION, OPSET
from fedtune.edge.build.model import logits_of
from fedtune.edge.build.output_layer import use_as_it_lies
from fedtune.errors import BaseModelError
from fedtune.types import Task

BATCH, TOKENS, LONGEST = "batch", "tokens", 1 << 16
LABELLED = "labelled"  # as many as a batch has labels: its texts, or all positions in them
INPUTS = ("input_ids", "attention_mask")


class _Logits(nn.Module):
    """A model's logits as a module, whatever its task."""

    def __init__(self, module: nn.Module, task: Task) -> None:
        super().__init__()
        self.module, self._task = module, task

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return logits_of(self.module, self._task, input_ids, attention_mask)


class _AdapterAsInputs(nn.Module):
    """The model as a function of its adapter's tensors too.

    As parameters they would lose their names, those that are zero would become one, and what is
    done to them first would be folded into them.
    """

    def __init__(self, adapter: AttachedAdapter, task: Task) -> None:
        super().__init__()
        self.module = _Logits(adapter.module, task)
        self._names = [f"module.{name}" for name in adapter.parameter_names()]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, adapter: list[Tensor]) -> Tensor:
        values = dict(zip(self._names, adapter, strict=True))
        logits: Tensor = torch.func.functional_call(
            self.module, values, (input_ids, attention_mask)
        )
        return logits


def export_forward(adapter: AttachedAdapter, task: Task, training: bool) -> onnx.ModelProto:
    """Ids and mask (int64 `[batch, tokens]`) and the adapter's tensors to `logits`.

    With `training` the adapter's dropout is in it. Raises `BaseModelError` if torch cannot export
    the model.
    """
    names = [tensor.name for tensor in adapter.manifest.tensors]
    adapter.module.eval()
    if training:
        adapter.train_mode()
    ids = torch.ones((3, 5), dtype=torch.int64)
    tensors = [torch.from_numpy(view) for view in adapter.manifest.split(adapter.read()).values()]
    batch = torch.export.Dim(BATCH, min=1, max=LONGEST)
    tokens = torch.export.Dim(TOKENS, min=1, max=LONGEST)
    dynamic = {0: batch, 1: tokens}
    try:
        with _eager_attention(adapter.module):
            model = export(
                _AdapterAsInputs(adapter, task),
                (ids, torch.ones_like(ids), tensors),
                [*INPUTS, *names],
                ["logits"],
                (dynamic, dynamic, [None] * len(names)),
            )
    finally:
        adapter.module.eval()
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = LABELLED
    if task == "causal-lm":
        use_as_it_lies(model)
    return model


def export(
    module: nn.Module,
    inputs: tuple[Any, ...],
    names: Sequence[str],
    outputs: Sequence[str],
    dynamic: tuple[Any, ...],
) -> onnx.ModelProto:
    """The graph of a module; `dynamic` has the dimensions that vary, for each of `inputs`.

    Raises `BaseModelError` if torch cannot export it.
    """
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                input_names=names,
                output_names=outputs,
                dynamic_shapes=dynamic,
            )
    except Exception as error:  # the exporter has dozens of its own kinds
        raise BaseModelError(
            f"the base model cannot be exported to ONNX: {type(error).__name__}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    if program is None:
        raise BaseModelError("the base model cannot be exported to ONNX")
    model: onnx.ModelProto = program.model_proto
    model.ir_version = IR_VERSION
    _name_dimensions(model, dynamic)
    return model


@contextlib.contextmanager
def _eager_attention(module: nn.Module) -> Iterator[None]:
    """Attention of single operators: the fused one has no gradient outside torch."""
    pretrained = next(m for m in module.modules() if isinstance(m, PreTrainedModel))
    before = pretrained.config._attn_implementation
    pretrained.set_attn_implementation("eager")
    try:
        yield
    finally:
        pretrained.set_attn_implementation(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of operators that nobody here has."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name_dimensions(model: onnx.ModelProto, dynamic: tuple[Any, ...]) -> None:
    """The exporter numbers the dimensions that vary; here they get their names back."""
    graph = model.graph
    names: dict[str, str] = {}
    for value, dims in zip(graph.input, dynamic, strict=False):
        if isinstance(dims, dict):
            shape = value.type.tensor_type.shape
            names |= {shape.dim[place].dim_param: dim.__name__ for place, dim in dims.items()}
    for value in (*graph.input, *graph.value_info, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = names.get(dim.dim_param, dim.dim_param)
