"""Gradients of ONNX graphs against torch's, operator by operator, run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, parser
from torch.nn import functional

from fedtune.edge.build.gradients import add_cross_entropy, add_gradients
from fedtune.edge.build.graph import IR_VERSION, OPSET, Graph
from fedtune.edge.runtime import import_runtime

HEAD = f'<ir_version: {IR_VERSION}, opset_import: ["" : {OPSET}]>\n'

# Name, graph of (x, p) or (x, p, q) to y, the same in torch. All by x too: so the gradient must
# pass through. `b` is a dimension that is known only when the graph runs.
CASES: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
    "matmul by a weight": (
        "g (float[b,5,4] x, float[4,3] p) => (float[b,5,3] y) { y = MatMul(x, p) }",
        torch.matmul,
    ),
    "matmul in batches": (
        "g (float[b,2,5,4] x, float[b,2,4,3] p) => (float[b,2,5,3] y) { y = MatMul(x, p) }",
        torch.matmul,
    ),
    "matmul with repeated batches": (
        "g (float[b,2,5,4] x, float[1,2,4,3] p) => (float[b,2,5,3] y) { y = MatMul(x, p) }",
        torch.matmul,
    ),
    "add of a vector": (
        "g (float[b,5,4] x, float[4] p) => (float[b,5,4] y) { y = Add(x, p) }",
        torch.add,
    ),
    "add of a column": (
        "g (float[b,5,4] x, float[5,1] p) => (float[b,5,4] y) { y = Add(x, p) }",
        torch.add,
    ),
    "add of itself": (
        "g (float[b,4] x, float[b,4] p) => (float[b,4] y) { a = Add(x, p) y = Add(a, a) }",
        lambda x, p: 2 * (x + p),
    ),
    "sub": ("g (float[1,4] x, float[b,3,4] p) => (float[b,3,4] y) { y = Sub(x, p) }", torch.sub),
    "mul": ("g (float[b,3,4] x, float[3,1] p) => (float[b,3,4] y) { y = Mul(x, p) }", torch.mul),
    "square": (
        "g (float[b,4] x, float[b,4] p) => (float[b,4] y) { a = Add(x, p) y = Mul(a, a) }",
        lambda x, p: (x + p) ** 2,
    ),
    "div": ("g (float[b,3,4] x, float[4] p) => (float[b,3,4] y) { y = Div(x, p) }", torch.div),
    "gemm": (
        "g (float[b,4] x, float[4,3] p, float[3] q) => (float[b,3] y) { y = Gemm(x, p, q) }",
        lambda x, p, q: x @ p + q,
    ),
    "gemm with the weight turned": (
        "g (float[b,4] x, float[3,4] p, float[3] q) => (float[b,3] y)"
        " { y = Gemm<transB=1>(x, p, q) }",
        lambda x, p, q: x @ p.T + q,
    ),
    "transpose": (
        "g (float[b,2,3] x, float[3] p) => (float[3,b,2] y)"
        " { a = Mul(x, p) y = Transpose<perm=[2,0,1]>(a) }",
        lambda x, p: (x * p).permute(2, 0, 1),
    ),
    "reshape": (
        "g (float[b,2,6] x, float[6] p) => (float[b,2,3,2] y)"
        " <int64[4] s = {0, 0, 3, 2}> { a = Mul(x, p) y = Reshape(a, s) }",
        lambda x, p: (x * p).reshape(-1, 2, 3, 2),
    ),
    "squeeze": (
        "g (float[b,1,4] x, float[4] p) => (float[b,4] y)"
        " <int64[1] s = {1}> { a = Mul(x, p) y = Squeeze(a, s) }",
        lambda x, p: (x * p).squeeze(1),
    ),
    "unsqueeze": (
        "g (float[b,4] x, float[4] p) => (float[b,1,4] y)"
        " <int64[1] s = {1}> { a = Mul(x, p) y = Unsqueeze(a, s) }",
        lambda x, p: (x * p).unsqueeze(1),
    ),
    "expand": (
        "g (float[b,1,4] x, float[4] p) => (float[b,3,4] y)"
        " <int64[3] s = {1, 3, 1}> { a = Mul(x, p) y = Expand(a, s) }",
        lambda x, p: (x * p).expand(-1, 3, -1),
    ),
    "sum": (
        "g (float[b,3,4] x, float[4] p) => (float[b,4] y)"
        " <int64[1] s = {1}> { a = Mul(x, p) y = ReduceSum<keepdims=0>(a, s) }",
        lambda x, p: (x * p).sum(1),
    ),
    "mean": (
        "g (float[b,3,4] x, float[4] p) => (float[b,3,1] y)"
        " <int64[1] s = {-1}> { a = Mul(x, p) y = ReduceMean<keepdims=1>(a, s) }",
        lambda x, p: (x * p).mean(-1, keepdim=True),
    ),
    "softmax": (
        "g (float[b,3,4] x, float[4] p) => (float[b,3,4] y)"
        " { a = Mul(x, p) y = Softmax<axis=-1>(a) }",
        lambda x, p: (x * p).softmax(-1),
    ),
    "layer normalization": (
        "g (float[b,3,4] x, float[4] p, float[4] q) => (float[b,3,4] y)"
        " { y = LayerNormalization<axis=-1, epsilon=0.00001>(x, p, q) }",
        lambda x, p, q: functional.layer_norm(x, (4,), p, q, 1e-5),
    ),
    "gelu": (
        "g (float[b,4] x, float[4] p) => (float[b,4] y) { a = Mul(x, p) y = Gelu(a) }",
        lambda x, p: functional.gelu(x * p),
    ),
    "sigmoid": (
        "g (float[b,4] x, float[4] p) => (float[b,4] y) { a = Mul(x, p) y = Sigmoid(a) }",
        lambda x, p: torch.sigmoid(x * p),
    ),
    "tanh": (
        "g (float[b,4] x, float[4] p) => (float[b,4] y) { a = Mul(x, p) y = Tanh(a) }",
        lambda x, p: torch.tanh(x * p),
    ),
    "relu": (
        "g (float[b,4] x, float[4] p) => (float[b,4] y) { a = Mul(x, p) y = Relu(a) }",
        lambda x, p: torch.relu(x * p),
    ),
    "neg": (
        "g (float[b,4] x, float[4] p) => (float[b,4] y) { a = Mul(x, p) y = Neg(a) }",
        lambda x, p: -(x * p),
    ),
    "square root": (
        "g (float[b,4] x, float[4] p) => (float[b,4] y)"
        " { a = Add(x, p) c = Mul(a, a) y = Sqrt(c) }",
        lambda x, p: ((x + p) ** 2).sqrt(),
    ),
    "reciprocal": (
        "g (float[b,4] x, float[4] p) => (float[b,4] y) { a = Mul(x, p) y = Reciprocal(a) }",
        lambda x, p: 1 / (x * p),
    ),
    "power of two": (
        "g (float[b,4] x, float[4] p) => (float[b,4] y) <float s = {2}>"
        " { a = Mul(x, p) y = Pow(a, s) }",
        lambda x, p: (x * p) ** 2,
    ),
    "power of three": (
        "g (float[b,4] x, float[4] p) => (float[b,4] y) <float s = {3}>"
        " { a = Mul(x, p) y = Pow(a, s) }",
        lambda x, p: (x * p) ** 3,
    ),
    "first token": (
        "g (float[b,t,4] x, float[4] p) => (float[b,4] y) <int64 s = {0}>"
        " { a = Mul(x, p) y = Gather<axis=1>(a, s) }",
        lambda x, p: (x * p)[:, 0],
    ),
    "slice": (
        "g (float[b,6] x, float[6] p) => (float[b,3] y)"
        " <int64[1] s = {2}, int64[1] e = {5}, int64[1] d = {1}>"
        " { a = Mul(x, p) y = Slice(a, s, e, d) }",
        lambda x, p: (x * p)[:, 2:5],
    ),
    "concat": (
        "g (float[b,4] x, float[b,2] p) => (float[b,6] y) { y = Concat<axis=1>(x, p) }",
        lambda x, p: torch.cat([x, p], 1),
    ),
}


def _with_seed(text: str) -> Graph:
    """The graph, and an input `seed` for the gradient by its output."""
    model = parser.parse_model(HEAD + text)
    seed = model.graph.input.add()
    seed.CopyFrom(model.graph.output[0])
    seed.name = "seed"
    return Graph(model)


def _run(graph: Graph, outputs: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    onnx.checker.check_model(graph.model)
    runtime = import_runtime()
    session = runtime.InferenceSession(
        graph.model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(outputs, inputs)


def _values(graph: Graph, seed: int) -> dict[str, np.ndarray]:
    """Random inputs; away from zero, where Relu and roots have no slope."""
    rng = np.random.default_rng(seed)
    sizes = {"b": 3, "t": 5}
    found = {}
    for value in graph.model.graph.input:
        shape = [sizes.get(d, d) for d in graph.shape(value.name)]
        found[value.name] = (rng.choice([-1, 1], shape) * rng.uniform(0.3, 1.5, shape)).astype("f4")
    return found


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_torch(name: str):
    text, compute = CASES[name]
    graph = _with_seed(text)
    inputs = _values(graph, 1)
    del inputs["seed"]
    found = add_gradients(graph, {"y": "seed"}, list(inputs))
    for variable, gradient in found.items():
        graph.publish(gradient, TensorProto.FLOAT, graph.shape(variable))
    graph.prune()

    leaves = {n: torch.from_numpy(v.copy()).requires_grad_() for n, v in inputs.items()}
    expected = compute(*leaves.values())
    seed = np.random.default_rng(2).normal(size=expected.shape).astype("f4")
    expected.backward(torch.from_numpy(seed))
    outputs = _run(graph, list(found.values()), {**inputs, "seed": seed})
    for leaf, gradient in zip(leaves.values(), outputs, strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=2e-5, atol=2e-6)


def test_cross_entropy_is_that_of_torch_without_labels_that_do_not_count():
    text = "g (float[b,7] p, int64[b] labels) => (float[b,7] logits) { logits = Identity(p) }"
    graph = Graph(parser.parse_model(HEAD + text))
    loss, slope = add_cross_entropy(graph, "logits", "labels")
    graph.publish(loss, TensorProto.FLOAT, ())
    graph.publish(slope, TensorProto.FLOAT, graph.shape("logits"))
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 3, (6, 7)).astype("f4")
    labels = np.array([0, 6, -100, 3, -100, 3])
    leaf = torch.from_numpy(logits.copy()).requires_grad_()
    expected = functional.cross_entropy(leaf, torch.from_numpy(labels))
    expected.backward()
    found, gradient = _run(graph, [loss, slope], {"p": logits, "labels": labels})
    assert found == pytest.approx(expected.item(), rel=1e-6)
    assert leaf.grad is not None
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), atol=1e-7)
    assert not gradient[[2, 4]].any()


def test_what_dropout_let_through_has_its_scale_and_the_rest_no_gradient():
    text = (
        "g (float[b,50] x, float[50] p) => (float[b,50] y) <float r = {0.3}, bool t = {1}>"
        " { a = Mul(x, p) y = Dropout(a, r, t) }"
    )
    graph = _with_seed(text)
    x = np.ones((40, 50), np.float32)
    gradient = add_gradients(graph, {"y": "seed"}, ["x"])["x"]
    graph.publish(gradient, TensorProto.FLOAT, ("b", 50))
    inputs = {"x": x, "p": np.full(50, 2, np.float32), "seed": x}
    y, found = _run(graph, ["y", gradient], inputs)
    np.testing.assert_allclose(found, y, rtol=1e-6)  # both 2 / 0.7, or 0
    kept = (found != 0).mean()
    assert abs(kept - 0.7) < 4 * np.sqrt(0.3 * 0.7 / found.size)
    np.testing.assert_allclose(found[found != 0], 2 / 0.7, rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("g (float[b,4] x) => (float[b,4] y) { y = Cos(x) }", "no gradient for the operator Cos"),
        (
            'g (float[b,4] x) => (float[b,4] y) { y = Gelu<approximate="tanh">(x) }',
            "no gradient for Gelu by tanh",
        ),
        ("g (float[b,4] x, float[4] p) => (float[b,4] y) { y = Neg(x) }", "does not depend on p"),
    ],
)
def test_what_has_no_gradient_is_said(text: str, message: str):
    graph = Graph(parser.parse_model(HEAD + text))
    names = [value.name for value in graph.model.graph.input]
    with pytest.raises(ValueError, match=message):
        add_gradients(graph, {"y": "y"}, names)


def test_nodes_that_nothing_depends_on_are_taken_out():
    text = "g (float[4] x) => (float[4] y) <float c = {2}> { a = Mul(x, c) y = Neg(x) }"
    graph = Graph(parser.parse_model(HEAD + text))
    graph.prune()
    assert [node.op_type for node in graph.model.graph.node] == ["Neg"]
    assert not graph.model.graph.initializer
