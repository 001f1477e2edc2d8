"""What ONNX Runtime's training build takes: a graph with gradients, and a checkpoint."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from fedtune.edge.build.graph import IR_VERSION
from fedtune.edge.runtime import import_training
from fedtune.errors import BaseModelError
from fedtune.train.texts import IGNORED

_OUTPUTS = {"Dropout": 2, "LayerNormalization": 3}


def make_training(
    forward: onnx.ModelProto, adapter: Mapping[str, NDArray[np.float32]]
) -> tuple[onnx.ModelProto, bytes]:
    """The training graph of a forward graph, and a checkpoint with nothing but the adapter.

    The frozen weights stay constants of the graph. Raises `BaseModelError` if ONNX Runtime has no
    gradient for an operator.
    """
    model = onnx.ModelProto()
    model.CopyFrom(forward)
    inputs = [value for value in model.graph.input if value.name not in adapter]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    for name, value in adapter.items():
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
    _prepare_gradients(model.graph)
    import_training()
    from onnxruntime.training import artifacts
    from onnxruntime.training.onnxblock.loss import CrossEntropyLoss

    with tempfile.TemporaryDirectory() as folder:
        try:
            with _silence():
                artifacts.generate_artifacts(
                    model,
                    requires_grad=list(adapter),
                    frozen_params=[],
                    loss=CrossEntropyLoss(ignore_index=IGNORED),
                    artifact_directory=folder,
                )
        except Exception as error:  # it raises RuntimeError and what its C++ side translates
            raise BaseModelError(
                f"ONNX Runtime cannot build the gradient: {str(error).strip().splitlines()[0]}"
            ) from error
        training = onnx.load(Path(folder) / "training_model.onnx")
        checkpoint = (Path(folder) / "checkpoint").read_bytes()
    training.ir_version = IR_VERSION
    return training, checkpoint


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing on standard error, where the gradient builder tells each of its steps."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _prepare_gradients(graph: onnx.GraphProto) -> None:
    """Outputs that only a gradient reads, and weights of normalizations that no two nodes share.

    Weights that are equal, as in a model that was never trained, are one constant, whose gradient
    would be defined twice.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    taken: set[str] = set()
    for node in graph.node:
        for place in range(1, _OUTPUTS.get(node.op_type, 0)):
            if len(node.output) <= place:
                node.output.append(f"{node.output[0]}_output_{place}")
        if node.op_type != "LayerNormalization":
            continue
        for place, name in enumerate(node.input):
            if place and name in taken:
                copy = graph.initializer.add()
                copy.CopyFrom(constants[name])
                copy.name = node.input[place] = f"{name}_of_{node.output[0]}"
            taken.add(name)
