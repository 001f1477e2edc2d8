"""Reverse-mode differentiation of an ONNX graph, into ordinary operators that any runtime has.

ONNX Runtime builds gradients only in its training builds, and torch can export them only through
private interfaces, in minutes. What an adapter in a transformer needs is few operators: each has
a rule here that says what its inputs' gradients are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from fedtune.edge.build.graph import Dim, Graph

FLOAT = np.float32

Rule = Callable[[Graph, NodeProto, str], dict[int, str]]


def add_cross_entropy(graph: Graph, logits: str, labels: str) -> tuple[str, str]:
    """Mean cross-entropy over the labels that count, named `loss`, and its gradient.

    `logits` is float32 `[n, classes]`, `labels` int64 `[n]`, in which `IGNORED` does not count.
    The gradient is that by the logits: (softmax - one-hot) / number of labels that count.
    """
    rows, classes = graph.shape(logits)
    zero = graph.constant(0)
    counts = graph.add("GreaterOrEqual", [labels, zero], (rows,))
    safe = graph.add("Where", [counts, labels, zero], (rows,))
    weight = graph.add("Cast", [counts], (rows,), to=TensorProto.FLOAT)
    number = graph.add("ReduceSum", [weight], (), keepdims=0)
    log_probabilities = graph.add("LogSoftmax", [logits], (rows, classes), axis=-1)
    last = graph.constant([-1])
    column = graph.add("Unsqueeze", [safe, last], (rows, 1))
    picked = graph.add("GatherElements", [log_probabilities, column], (rows, 1), axis=1)
    weights = graph.add("Unsqueeze", [weight, last], (rows, 1))
    kept = graph.add("Mul", [picked, weights], (rows, 1))
    total = graph.add("ReduceSum", [kept], (), keepdims=0)
    mean = graph.add("Div", [total, number], ())
    loss = graph.add("Neg", [mean], (), output="loss")
    probabilities = graph.add("Exp", [log_probabilities], (rows, classes))
    depth = graph.constant(_number(classes))
    values = graph.constant([0, 1], FLOAT)
    right = graph.add("OneHot", [safe, depth, values], (rows, classes), axis=-1)
    difference = graph.add("Sub", [probabilities, right], (rows, classes))
    share = graph.add("Div", [weights, number], (rows, 1))
    return loss, graph.add("Mul", [difference, share], (rows, classes))


def add_gradients(
    graph: Graph, slopes: Mapping[str, str], parameters: Sequence[str]
) -> dict[str, str]:
    """Append what computes the gradients by `parameters`; their names.

    `slopes` has the gradient by each output. Raises `ValueError` for an operator without a rule
    between them.
    """
    nodes = list(graph.model.graph.node)
    wanted = set(parameters)  # depends on a parameter, or is one
    for node in nodes:
        if wanted.intersection(node.input):
            wanted.update(node.output)
    parts = {output: [slope] for output, slope in slopes.items()}
    for node in reversed(nodes):
        found = parts.pop(node.output[0], None) if node.output else None
        if found is None or not wanted.intersection(node.input):
            continue
        rule = _RULES.get(node.op_type)
        if rule is None:
            raise ValueError(f"there is no gradient for the operator {node.op_type}")
        gone = _sum(graph, found)
        for place, name in rule(graph, node, gone).items():
            if node.input[place] in wanted:
                parts.setdefault(node.input[place], []).append(name)
    missing = [name for name in parameters if name not in parts]
    if missing:
        raise ValueError(f"the output does not depend on {missing[0]}")
    return {name: _sum(graph, parts[name]) for name in parameters}


def _sum(graph: Graph, parts: list[str]) -> str:
    total = parts[0]
    for part in parts[1:]:
        total = graph.add("Add", [total, part], graph.shape(total))
    return total


def _number(dim: Dim) -> int:
    if not isinstance(dim, int):
        raise ValueError(f"a dimension is {dim!r} and must be a number")
    return dim


def _attribute(node: NodeProto, name: str, default: int) -> int:
    for attribute in node.attribute:
        if attribute.name == name:
            return int(helper.get_attribute_value(attribute))
    return default


def _constant_of(graph: Graph, name: str) -> NDArray[Any]:
    for tensor in graph.model.graph.initializer:
        if tensor.name == name:
            return numpy_helper.to_array(tensor)
    for node in graph.model.graph.node:
        if node.op_type == "Constant" and name in node.output:
            return numpy_helper.to_array(node.attribute[0].t)
    raise ValueError(f"{name} is not a constant")


def _axes(graph: Graph, node: NodeProto, rank: int) -> list[int]:
    """The axes that a reduction, a Squeeze or an Unsqueeze names, from 0."""
    if len(node.input) > 1 and node.input[1]:
        return [int(axis) % rank for axis in _constant_of(graph, node.input[1]).reshape(-1)]
    return list(range(rank))


def _reshaped(graph: Graph, value: str, like: str) -> str:
    """`value` in the shape of `like`, which has as many elements."""
    have, wanted = graph.shape(value), graph.shape(like)
    if have == wanted:
        return value
    return graph.add("Reshape", [value, graph.target(wanted)], wanted)


def _unbroadcast(graph: Graph, gradient: str, like: str) -> str:
    """The gradient of a value that was repeated: summed over where it was."""
    have, wanted = graph.shape(gradient), graph.shape(like)
    extra = len(have) - len(wanted)
    axes = list(range(extra))
    axes += [
        place + extra for place, dim in enumerate(wanted) if dim == 1 and have[place + extra] != 1
    ]
    if not axes:
        return gradient
    summed_shape = tuple(1 if place in axes else dim for place, dim in enumerate(have))
    summed = graph.add("ReduceSum", [gradient, graph.constant(axes)], summed_shape, keepdims=1)
    return _reshaped(graph, summed, like)


def _wide(graph: Graph, node: NodeProto) -> tuple[Dim, ...]:
    return graph.shape(node.output[0])


def _add(graph: Graph, node: NodeProto, gradient: str) -> dict[int, str]:
    return {place: _unbroadcast(graph, gradient, name) for place, name in enumerate(node.input)}


def _sub(graph: Graph, node: NodeProto, gradient: str) -> dict[int, str]:
    negative = graph.add("Neg", [gradient], graph.shape(gradient))
    return {
        0: _unbroadcast(graph, gradient, node.input[0]),
        1: _unbroadcast(graph, negative, node.input[1]),
    }


def _mul(graph: Graph, node: NodeProto, gradient: str) -> dict[int, str]:
    left, right = node.input
    shape = _wide(graph, node)
    return {
        0: _unbroadcast(graph, graph.add("Mul", [gradient, right], shape), left),
        1: _unbroadcast(graph, graph.add("Mul", [gradient, left], shape), right),
    }


def _div(graph: Graph, node: NodeProto, gradient: str) -> dict[int, str]:
    left, right = node.input
    shape = _wide(graph, node)
    over = graph.add("Div", [gradient, right], shape)
    down = graph.add("Mul", [over, node.output[0]], shape)
    return {
        0: _unbroadcast(graph, over, left),
        1: _unbroadcast(graph, graph.add("Neg", [down], shape), right),
    }


def _matmul(graph: Graph, node: NodeProto, gradient: str) -> dict[int, str]:
    left, right = node.input
    a, b = graph.shape(left), graph.shape(right)
    if len(b) == 2:
        # As matrices: Gemm takes the weight as it lies, where a Transpose would be folded into a
        # second copy of it.
        rows = graph.add("Reshape", [gradient, graph.constant([-1, _number(b[1])])], (None, b[1]))
        by_left = graph.add("Gemm", [rows, right], (None, b[0]), transB=1)
        flat = graph.add("Reshape", [left, graph.constant([-1, _number(b[0])])], (None, b[0]))
        by_right = graph.add("Gemm", [flat, rows], b, transA=1)
        return {0: _reshaped(graph, by_left, left), 1: by_right}
    if len(a) != len(b):
        raise ValueError(f"there is no gradient for MatMul of {a} by {b}")
    batches = _wide(graph, node)[:-2]
    by_left = graph.add("MatMul", [gradient, _turned(graph, right)], (*batches, *a[-2:]))
    by_right = graph.add("MatMul", [_turned(graph, left), gradient], (*batches, *b[-2:]))
    return {0: _unbroadcast(graph, by_left, left), 1: _unbroadcast(graph, by_right, right)}


def _turned(graph: Graph, name: str) -> str:
    shape = graph.shape(name)
    order = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
    return graph.add("Transpose", [name], [shape[place] for place in order], perm=order)


def _gemm(graph: Graph, node: NodeProto, gradient: str) -> dict[int, str]:
    floats = {a.name: a.f for a in node.attribute if a.name in {"alpha", "beta"}}
    if any(value != 1 for value in floats.values()) or _attribute(node, "transA", 0):
        raise ValueError("there is no gradient for Gemm with alpha, beta or transA")
    left, right = node.input[:2]
    turned = _attribute(node, "transB", 0)
    by_left = graph.add("Gemm", [gradient, right], graph.shape(left), transB=1 - turned)
    order = [gradient, left] if turned else [left, gradient]
    by_right = graph.add("Gemm", order, graph.shape(right), transA=1)
    found = {0: by_left, 1: by_right}
    if len(node.input) > 2:
        found[2] = _unbroadcast(graph, gradient, node.input[2])
    return found


def _transpose(graph: Graph, node: NodeProto, gradient: str) -> dict[int, str]:
    shape = graph.shape(node.input[0])
    order = list(range(len(shape)))[::-1]
    for attribute in node.attribute:
        order = list(attribute.ints)
    return {0: graph.add("Transpose", [gradient], shape, perm=[int(p) for p in np.argsort(order)])}


def _same_elements(graph: Graph, node: NodeProto, gradient: str) -> dict[int, str]:
    return {0: _reshaped(graph, gradient, node.input[0])}


def _expand(graph: Graph, node: NodeProto, gradient: str) -> dict[int, str]:
    return {0: _unbroadcast(graph, gradient, node.input[0])}


def _reduce(graph: Graph, node: NodeProto, gradient: str) -> dict[int, str]:
    name = node.input[0]
    shape = graph.shape(name)
    axes = _axes(graph, node, len(shape))
    if not _attribute(node, "keepdims", 1):
        kept = tuple(1 if place in axes else dim for place, dim in enumerate(shape))
        gradient = graph.add("Unsqueeze", [gradient, graph.constant(axes)], kept)
    if node.op_type == "ReduceMean":
        size = graph.constant(math.prod(_number(shape[axis]) for axis in axes), FLOAT)
        gradient = graph.add("Div", [gradient, size], graph.shape(gradient))
    return {0: graph.add("Expand", [gradient, graph.target(shape)], shape)}


def _softmax(graph: Graph, node: NodeProto, gradient: str) -> dict[int, str]:
    shape = _wide(graph, node)
    axis = _attribute(node, "axis", -1) % len(shape)
    weighted = graph.add("Mul", [gradient, node.output[0]], shape)
    total = _sum_over(graph, "ReduceSum", weighted, axis)
    centred = graph.add("Sub", [gradient, total], shape)
    return {0: graph.add("Mul", [centred, node.output[0]], shape)}


def _sum_over(graph: Graph, operator: str, name: str, axis: int) -> str:
    shape = graph.shape(name)
    kept = tuple(1 if place == axis else dim for place, dim in enumerate(shape))
    return graph.add(operator, [name, graph.constant([axis])], kept, keepdims=1)


def _layer_normalization(graph: Graph, node: NodeProto, gradient: str) -> dict[int, str]:
    name, scale = node.input[:2]
    shape = graph.shape(name)
    axis = _attribute(node, "axis", -1) % len(shape)
    if axis != len(shape) - 1:
        raise ValueError("there is no gradient for LayerNormalization over several axes")
    narrow = (*shape[:-1], 1)
    mean, inverse = (graph.add_output(node, place, narrow) for place in (1, 2))
    centred = graph.add("Sub", [name, mean], shape)
    normal = graph.add("Mul", [centred, inverse], shape)
    scaled = graph.add("Mul", [gradient, scale], shape)
    level = _sum_over(graph, "ReduceMean", scaled, axis)
    product = graph.add("Mul", [scaled, normal], shape)
    slope = _sum_over(graph, "ReduceMean", product, axis)
    along = graph.add("Mul", [normal, slope], shape)
    rest = graph.add("Sub", [graph.add("Sub", [scaled, level], shape), along], shape)
    by_scale = graph.add("Mul", [gradient, normal], shape)
    found = {
        0: graph.add("Mul", [rest, inverse], shape),
        1: _unbroadcast(graph, by_scale, scale),
    }
    if len(node.input) > 2 and node.input[2]:
        found[2] = _unbroadcast(graph, gradient, node.input[2])
    return found


def _scaled_by(graph: Graph, gradient: str, slope: str) -> dict[int, str]:
    return {0: graph.add("Mul", [gradient, slope], graph.shape(gradient))}


def _gelu(graph: Graph, node: NodeProto, gradient: str) -> dict[int, str]:
    """x Φ(x): the slope is Φ(x) + x φ(x), with the normal distribution and its density."""
    if any(a.name == "approximate" and a.s not in (b"", b"none") for a in node.attribute):
        raise ValueError("there is no gradient for Gelu by tanh")
    name = node.input[0]
    shape = graph.shape(name)

    def by(value: str, factor: float) -> str:
        return graph.add("Mul", [value, graph.constant(factor, FLOAT)], shape)

    error = graph.add("Erf", [by(name, math.sqrt(0.5))], shape)
    raised = graph.add("Add", [error, graph.constant(1, FLOAT)], shape)
    square = graph.add("Mul", [name, name], shape)
    bell = graph.add("Exp", [by(square, -0.5)], shape)
    density = graph.add("Mul", [name, by(bell, 1 / math.sqrt(2 * math.pi))], shape)
    return _scaled_by(graph, gradient, graph.add("Add", [by(raised, 0.5), density], shape))


def _sigmoid(graph: Graph, node: NodeProto, gradient: str) -> dict[int, str]:
    shape, result = _wide(graph, node), node.output[0]
    square = graph.add("Mul", [result, result], shape)
    return _scaled_by(graph, gradient, graph.add("Sub", [result, square], shape))


def _tanh(graph: Graph, node: NodeProto, gradient: str) -> dict[int, str]:
    shape, result = _wide(graph, node), node.output[0]
    square = graph.add("Mul", [result, result], shape)
    return _scaled_by(graph, gradient, graph.add("Sub", [graph.constant(1, FLOAT), square], shape))


def _relu(graph: Graph, node: NodeProto, gradient: str) -> dict[int, str]:
    shape = _wide(graph, node)
    above = graph.add("Greater", [node.input[0], graph.constant(0, FLOAT)], shape)
    return _scaled_by(graph, gradient, graph.add("Cast", [above], shape, to=TensorProto.FLOAT))


def _neg(graph: Graph, _node: NodeProto, gradient: str) -> dict[int, str]:
    return {0: graph.add("Neg", [gradient], graph.shape(gradient))}


def _sqrt(graph: Graph, node: NodeProto, gradient: str) -> dict[int, str]:
    shape = _wide(graph, node)
    twice = graph.add("Mul", [node.output[0], graph.constant(2, FLOAT)], shape)
    return {0: graph.add("Div", [gradient, twice], shape)}


def _reciprocal(graph: Graph, node: NodeProto, gradient: str) -> dict[int, str]:
    shape, result = _wide(graph, node), node.output[0]
    square = graph.add("Mul", [result, result], shape)
    return _scaled_by(graph, gradient, graph.add("Neg", [square], shape))


def _power(graph: Graph, node: NodeProto, gradient: str) -> dict[int, str]:
    name, shape = node.input[0], _wide(graph, node)
    exponent = float(_constant_of(graph, node.input[1]).reshape(-1)[0])
    lower = name
    if exponent != 2:
        lower = graph.add("Pow", [name, graph.constant(exponent - 1, FLOAT)], shape)
    return _scaled_by(
        graph, gradient, graph.add("Mul", [lower, graph.constant(exponent, FLOAT)], shape)
    )


def _dropout(graph: Graph, node: NodeProto, gradient: str) -> dict[int, str]:
    """What was let through was scaled by 1 / (1 - ratio)."""
    shape = _wide(graph, node)
    mask = graph.add_output(node, 1, shape)
    kept = graph.add("Cast", [mask], shape, to=TensorProto.FLOAT)
    ratio = float(_constant_of(graph, node.input[1]).reshape(-1)[0])
    scale = graph.constant(1 / (1 - ratio), FLOAT)
    return _scaled_by(graph, gradient, graph.add("Mul", [kept, scale], shape))


def _gather(graph: Graph, node: NodeProto, gradient: str) -> dict[int, str]:
    """Of one place along an axis, such as each text's first token."""
    name, index = node.input
    shape = graph.shape(name)
    axis = _attribute(node, "axis", 0) % len(shape)
    if graph.shape(index):
        raise ValueError("there is no gradient for Gather of several places")
    length = graph.target([shape[axis]])
    values = graph.constant([0, 1], FLOAT)
    places = graph.add("Unsqueeze", [index, graph.constant([0])], (1,))
    line = graph.add("OneHot", [places, length, values], (1, shape[axis]), axis=-1)
    ones = [1] * (len(shape) - axis - 1)
    column = graph.add("Reshape", [line, graph.constant([-1, *ones])], (shape[axis], *ones))
    narrow = tuple(1 if place == axis else dim for place, dim in enumerate(shape))
    wide = graph.add("Unsqueeze", [gradient, graph.constant([axis])], narrow)
    return {0: graph.add("Mul", [wide, column], shape)}


def _slice(graph: Graph, node: NodeProto, gradient: str) -> dict[int, str]:
    """Zeros around the part that was taken, along axes whose length is known."""
    name = node.input[0]
    shape = graph.shape(name)
    starts, ends = (_constant_of(graph, node.input[i]).reshape(-1) for i in (1, 2))
    axes = list(range(len(starts)))
    if len(node.input) > 3 and node.input[3]:
        axes = [int(a) % len(shape) for a in _constant_of(graph, node.input[3]).reshape(-1)]
    if len(node.input) > 4 and (_constant_of(graph, node.input[4]) != 1).any():
        raise ValueError("there is no gradient for Slice with steps")
    before, after = [0] * len(shape), [0] * len(shape)
    for start, end, axis in zip(starts, ends, axes, strict=True):
        if start == 0 and end > 1 << 60:
            continue  # all of it
        size = _number(shape[axis])
        first, last, _ = slice(int(start), int(end)).indices(size)
        before[axis], after[axis] = first, size - last
    pads = graph.constant([*before, *after])
    return {0: graph.add("Pad", [gradient, pads], shape)}


def _concat(graph: Graph, node: NodeProto, gradient: str) -> dict[int, str]:
    found, start = {}, 0
    axis = _attribute(node, "axis", 0) % len(graph.shape(gradient))
    for place, name in enumerate(node.input):
        shape = graph.shape(name)
        end = start + _number(shape[axis])
        bounds = [graph.constant([value]) for value in (start, end, axis)]
        found[place] = graph.add("Slice", [gradient, *bounds], shape)
        start = end
    return found


_RULES: dict[str, Rule] = {
    "Add": _add,
    "Cast": _same_elements,  # among floats only: nothing else depends on a parameter
    "Concat": _concat,
    "Div": _div,
    "Dropout": _dropout,
    "Expand": _expand,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "Identity": _same_elements,
    "LayerNormalization": _layer_normalization,
    "MatMul": _matmul,
    "Mul": _mul,
    "Neg": _neg,
    "Pow": _power,
    "Reciprocal": _reciprocal,
    "ReduceMean": _reduce,
    "ReduceSum": _reduce,
    "Relu": _relu,
    "Reshape": _same_elements,
    "Sigmoid": _sigmoid,
    "Slice": _slice,
    "Softmax": _softmax,
    "Sqrt": _sqrt,
    "Squeeze": _same_elements,
    "Sub": _sub,
    "Tanh": _tanh,
    "Transpose": _transpose,
    "Unsqueeze": _same_elements,
}
