"""In which order nodes stand, so that little memory is in use at a time.

ONNX Runtime runs a graph by a depth-first search from its outputs, and of a node's inputs it
computes that one first whose node stands last. What waits longest for its turn must stand first.
"""

from __future__ import annotations

import onnx


def order(model: onnx.ModelProto, source: str) -> None:
    """Put weights that are unpacked first, and what depends on the input `source` last.

    So a weight is unpacked when everything else is there for the node that uses it; and a slope of
    the backward pass is computed when the gradient that it scales has arrived.
    """
    unpacking, early, late = [], [], []
    depends = {source}
    for node in model.graph.node:
        if depends.intersection(node.input):
            depends.update(node.output)
            late.append(node)
        elif node.op_type == "DequantizeLinear":
            unpacking.append(node)
        else:
            early.append(node)
    del model.graph.node[:]
    model.graph.node.extend([*unpacking, *early, *late])
