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
    for name in tables:
        if large[name].dims[0] < FEWEST_ROWS or _uses(graph, name) > 1:
            del large[name]
    added: list[TensorProto] = []
    scales: dict[str, NDArray[np.float32]] = {}
    for name, tensor in large.items():
        axis = 0 if name in tables else 1
        integers, scales[name] = round_weight(numpy_helper.to_array(tensor), axis)
        added.append(numpy_helper.from_array(integers, f"{name}_int8"))
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.input and node.input[0] in large and node.input[0] in tables:
            table = node.input[0]
            added.append(numpy_helper.from_array(scales[table], f"{table}_scale"))
            nodes += _gathered(node, table)
            continue
        for place, name in enumerate(node.input):
            if name in large:
                # Each use has its own float32 weight, for the time that it takes; and its own
                # scales, or the runtime would find two of them equal and keep one for both.
                value = f"{name}_float_{len(nodes)}"
                added.append(numpy_helper.from_array(scales[name].reshape(-1), f"{value}_scale"))
                whole = [f"{name}_int8", f"{value}_scale"]
                nodes.append(
                    helper.make_node("DequantizeLinear", whole, [value], axis=1, name=value)
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


def _uses(graph: onnx.GraphProto, name: str) -> int:
    return sum(list(node.input).count(name) for node in graph.node)


def _gathered(node: onnx.NodeProto, table: str) -> list[onnx.NodeProto]:
    """Rows of a table of integers, times each row's scale."""
    out, places = node.output[0], node.input[1]
    return [
        helper.make_node("Gather", [f"{table}_int8", places], [f"{out}_int8"], axis=0),
        helper.make_node("Cast", [f"{out}_int8"], [f"{out}_whole"], to=TensorProto.FLOAT),
        helper.make_node("Gather", [f"{table}_scale", places], [f"{out}_scale"], axis=0),
        helper.make_node("Mul", [f"{out}_whole", f"{out}_scale"], [out]),
    ]
