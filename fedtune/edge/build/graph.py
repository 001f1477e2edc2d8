"""An ONNX graph that nodes are added to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, DTypeLike
from onnx import helper, numpy_helper

# The newest that ONNX Runtime 1.19.2 loads, the last one that trains.
OPSET, IR_VERSION = 20, 10

Dim = int | str | None


class Graph:
    """A model being changed, with the shapes of its values.

    A dimension is a number, a name where it differs from batch to batch, or None where nothing is
    known of it.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self._targets: dict[tuple[Dim, ...], str] = {}
        self._names = {name for node in model.graph.node for name in node.output}
        self._names |= {value.name for value in model.graph.input}
        self._names |= {tensor.name for tensor in model.graph.initializer}
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        self._shapes: dict[str, tuple[Dim, ...]] = {
            tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer
        }
        for value in (*inferred.input, *inferred.value_info, *inferred.output):
            if value.type.tensor_type.HasField("shape"):
                self._shapes[value.name] = tuple(
                    _dim(dim) for dim in value.type.tensor_type.shape.dim
                )

    def shape(self, name: str) -> tuple[Dim, ...]:
        """The shape of a value; raises `ValueError` where even its rank is unknown."""
        if name not in self._shapes:
            raise ValueError(f"nothing is known of the shape of {name}")
        return self._shapes[name]

    def constant(self, value: ArrayLike, dtype: DTypeLike = np.int64) -> str:
        """An initializer with this value."""
        array = np.asarray(value, dtype)
        name = self._fresh("constant")
        self.model.graph.initializer.append(numpy_helper.from_array(array, name))
        self._shapes[name] = array.shape
        return name

    def add(
        self,
        operator: str,
        inputs: Sequence[str],
        shape: Sequence[Dim],
        output: str | None = None,
        **attributes: Any,
    ) -> str:
        """Append a node whose one output has this shape; returns the output's name."""
        name = output or self._fresh(operator.lower())
        self._names.add(name)
        self._shapes[name] = tuple(shape)
        node = helper.make_node(operator, list(inputs), [name], name=f"{name}_node", **attributes)
        self.model.graph.node.append(node)
        return name

    def add_output(self, node: onnx.NodeProto, place: int, shape: Sequence[Dim]) -> str:
        """The name of an optional output of a node, which is given one if it has none."""
        while len(node.output) <= place:
            node.output.append("")
        if not node.output[place]:
            node.output[place] = self._fresh(node.op_type.lower())
        self._shapes[node.output[place]] = tuple(shape)
        return node.output[place]

    def target(self, shape: Sequence[Dim]) -> str:
        """A shape as Reshape and Expand take it, made of the sizes of the graph's inputs.

        And not of a value that has this shape: that would be kept in memory until then.
        """
        wanted = tuple(shape)
        if wanted not in self._targets:
            numbers = [dim for dim in wanted if isinstance(dim, int)]
            if len(numbers) == len(wanted):
                self._targets[wanted] = self.constant(numbers)
            else:
                sizes = [
                    self.constant([dim]) if isinstance(dim, int) else self._size(dim)
                    for dim in wanted
                ]
                self._targets[wanted] = self.add("Concat", sizes, (len(wanted),), axis=0)
        return self._targets[wanted]

    def _size(self, dim: Dim) -> str:
        for value in self.model.graph.input:
            shape = self._shapes.get(value.name, ())
            if dim is not None and dim in shape:
                whole = self.add("Shape", [value.name], (len(shape),))
                return self.add("Gather", [whole, self.constant([shape.index(dim)])], (1,))
        raise ValueError(f"no input has the dimension {dim}")

    def prune(self) -> None:
        """Take out the nodes and constants that no output depends on."""
        graph = self.model.graph
        used = {value.name for value in graph.output}
        kept = []
        for node in reversed(graph.node):
            if used.intersection(node.output):
                used.update(node.input)
                kept.append(node)
        constants = [tensor for tensor in graph.initializer if tensor.name in used]
        del graph.node[:], graph.initializer[:]
        graph.node.extend(reversed(kept))
        graph.initializer.extend(constants)

    def publish(self, name: str, element: int, shape: Sequence[Dim]) -> None:
        """Make a value an output of the graph; `element` is a `TensorProto` data type."""
        self.model.graph.output.append(helper.make_tensor_value_info(name, element, list(shape)))

    def _fresh(self, stem: str) -> str:
        number = len(self._names)
        while (name := f"fedtune_{stem}_{number}") in self._names:
            number += 1
        self._names.add(name)
        return name


def _dim(dim: Any) -> Dim:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    return dim.dim_param or None
