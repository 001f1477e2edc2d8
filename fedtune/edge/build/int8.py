"""Frozen weights as 8-bit integers with one scale per output: a quarter of the memory.

Symmetric rounding to the nearest of 255 levels (weight-only; Jacob et al. 2018, section 2, with the
zero point at 0). A graph turns a weight back into float32 where it is used, so gradients flow as
through the rounded weight: the adapter learns on the model that the device really has.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

LEVELS = 127
SMALLEST = 1 << 16  # elements of a weight that is worth it
FEWEST_ROWS = 1024  # of a table of embeddings


def quantize(model: onnx.ModelProto, adapter: Collection[str]) -> int:
    """Quantize all large matrices that are not of the adapter; how many there were."""
    graph = model.graph
    large = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.name not in adapter
        and tensor.data_type == TensorProto.FLOAT
        and len(tensor.dims) == 2
        and tensor.dims[0] * tensor.dims[1] >= SMALLEST
    }
    tables = {
        node.input[0] for node in graph.node if node.op_type == "Gather" and node.input[0] in large
    }
    for table in tables:
        if large[table].dims[0] < FEWEST_ROWS:
            del large[table]
    added: list[TensorProto] = []
    scales: dict[str, NDArray[np.float32]] = {}
    axes: dict[str, int] = {}
    for name, tensor in large.items():
        axes[name] = axis = _axis_of_outputs(graph, name)
        integers, scales[name] = round_weight(numpy_helper.to_array(tensor), axis)
        added.append(numpy_helper.from_array(integers, f"{name}_int8"))
        if name in tables:
            added.append(numpy_helper.from_array(scales[name], f"{name}_scale"))
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in large:
            nodes += _gathered(node, node.input[0])
            continue
        for place, name in enumerate(node.input):
            if name in large:
                # Each use has its own float32 weight, for the time that it takes; and its own
                # scales, or the runtime would find two of them equal and keep one for both.
                value = f"{name}_float_{len(nodes)}"
                added.append(numpy_helper.from_array(scales[name].reshape(-1), f"{value}_scale"))
                whole = [f"{name}_int8", f"{value}_scale"]
                nodes.append(
                    helper.make_node(
                        "DequantizeLinear", whole, [value], axis=axes[name], name=value
                    )
                )
                node.input[place] = value
        nodes.append(node)
    kept = [tensor for tensor in graph.initializer if tensor.name not in large]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*kept, *added])
    return len(large)


def round_weight(
    weight: NDArray[np.float32], axis: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """`weight` (float32, two axes) as int8, and its scales: of each place along `axis` one."""
    largest = np.abs(weight).max(axis=1 - axis, keepdims=True)
    scale = np.maximum(largest, np.finfo(np.float32).tiny * LEVELS) / np.float32(LEVELS)
    integers = np.clip(np.rint(weight / scale), -LEVELS, LEVELS).astype(np.int8)
    return integers, scale.astype(np.float32)


def _axis_of_outputs(graph: onnx.GraphProto, name: str) -> int:
    """Along which axis a weight's outputs lie where it is first used, in the forward pass.

    The rows of a table are its outputs; as a language model's output layer too, so that both uses
    share integers and scales.
    """
    first = next((node for node in graph.node if name in node.input), onnx.NodeProto())
    turned = any(a.name == "transB" and a.i for a in first.attribute)
    return 0 if first.op_type == "Gather" or turned else 1


def _gathered(node: onnx.NodeProto, table: str) -> list[onnx.NodeProto]:
    """Rows of a table of integers, times each row's scale."""
    out, places = node.output[0], node.input[1]
    return [
        helper.make_node("Gather", [f"{table}_int8", places], [f"{out}_int8"], axis=0),
        helper.make_node("Cast", [f"{out}_int8"], [f"{out}_whole"], to=TensorProto.FLOAT),
        helper.make_node("Gather", [f"{table}_scale", places], [f"{out}_scale"], axis=0),
        helper.make_node("Mul", [f"{out}_whole", f"{out}_scale"], [out]),
    ]
