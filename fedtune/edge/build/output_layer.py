"""A language model's output layer, computed from the weight as it lies.

Often it is the table of embeddings too. The exporter turns it around, and a runtime that does so
beforehand keeps a second copy of the largest weight there is.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
from onnx import helper, numpy_helper

_WIDTH = "output_layer_width"


def use_as_it_lies(model: onnx.ModelProto) -> None:
    """Make the matrix product that ends in the graph's output a Gemm with the stored weight.

    Nothing is changed where the graph does not end in Transpose, MatMul and Reshape.
    """
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    reshape = makers[graph.output[0].name]
    product = makers.get(reshape.input[0])
    if reshape.op_type != "Reshape" or product is None or product.op_type != "MatMul":
        return
    turned = makers.get(product.input[1])
    if turned is None or turned.op_type != "Transpose" or turned.input[0] not in weights:
        return
    if uses[product.output[0]] > 1 or uses[turned.output[0]] > 1:
        return
    width = np.array([-1, weights[turned.input[0]].dims[1]], np.int64)
    graph.initializer.append(numpy_helper.from_array(width, _WIDTH))
    rows = f"{product.input[0]}_rows"
    replaced = [
        helper.make_node("Reshape", [product.input[0], _WIDTH], [rows], name=rows),
        helper.make_node(
            "Gemm", [rows, turned.input[0]], list(reshape.output), name="output_layer", transB=1
        ),
    ]
    kept = [node for node in graph.node if node not in (reshape, product, turned)]
    del graph.node[:]
    graph.node.extend([*kept, *replaced])
