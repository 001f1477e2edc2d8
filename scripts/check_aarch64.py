"""What `check_aarch64.sh` runs: a graph is built on this machine and trained on the emulated one.

    check_aarch64.py build FOLDER                    here; needs onnx
    check_aarch64.py import PACKAGES DISTRIBUTION    there; needs the distribution alone
    check_aarch64.py step FOLDER                     there; needs onnxruntime and numpy

Each prints one line that says what was found, and fails with one that says what was wrong.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import struct
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Arrays = dict[str, NDArray[np.float32 | np.float64 | np.int64]]

BATCH, TOKENS, VOCABULARY, HIDDEN, RANK, CLASSES = 16, 48, 1000, 384, 8, 12
STEPS = 20
LEARNING_RATE = 0.5
TOLERANCE = 1e-4  # of a gradient's largest entry; float32 beside float64
LARGEST_PAGE = 16_384  # bytes; kernels of some boards have pages of 16 KiB

# Two layers over the mean of the tokens that count: tanh(x·weight + (x·down)·up), then ·head. The
# loss is the cross entropy. `down`, `up` and `head` are the adapter, `table` and `weight` frozen.
GRAPH = f"""
<ir_version: 10, opset_import: ["": 20]>
step (
    int64[batch, tokens] input_ids, int64[batch, tokens] attention_mask, int64[batch] labels,
    float[{HIDDEN}, {RANK}] down, float[{RANK}, {HIDDEN}] up, float[{HIDDEN}, {CLASSES}] head
) => (
    float loss, float[{HIDDEN}, {RANK}] down_gradient, float[{RANK}, {HIDDEN}] up_gradient,
    float[{HIDDEN}, {CLASSES}] head_gradient
) {{
    first = Constant <value_ints = [1]> ()
    last = Constant <value_ints = [-1]> ()
    one = Constant <value_float = 1.0> ()
    off_on = Constant <value_floats = [0.0, 1.0]> ()
    classes = Constant <value_ints = [{CLASSES}]> ()
    embedded = Gather (table, input_ids)
    mask = Cast <to = 1> (attention_mask)
    mask_column = Unsqueeze (mask, last)
    counted = Mul (embedded, mask_column)
    summed = ReduceSum <keepdims = 0> (counted, first)
    count = ReduceSum <keepdims = 1> (mask, first)
    x = Div (summed, count)
    low = MatMul (x, down)
    frozen = MatMul (x, weight)
    adapted = MatMul (low, up)
    z = Add (frozen, adapted)
    y = Tanh (z)
    logits = MatMul (y, head)
    log_probabilities = LogSoftmax <axis = -1> (logits)
    target = OneHot <axis = -1> (labels, classes, off_on)
    likelihoods = Mul (log_probabilities, target)
    likelihood = ReduceSum <keepdims = 0> (likelihoods, last)
    mean_likelihood = ReduceMean <keepdims = 0> (likelihood)
    loss = Neg (mean_likelihood)

    probabilities = Softmax <axis = -1> (logits)
    excess = Sub (probabilities, target)
    shape = Shape (labels)
    batch_size = Cast <to = 1> (shape)
    logits_gradient = Div (excess, batch_size)
    y_turned = Transpose <perm = [1, 0]> (y)
    head_gradient = MatMul (y_turned, logits_gradient)
    head_turned = Transpose <perm = [1, 0]> (head)
    y_gradient = MatMul (logits_gradient, head_turned)
    y_squared = Mul (y, y)
    slope = Sub (one, y_squared)
    z_gradient = Mul (y_gradient, slope)
    low_turned = Transpose <perm = [1, 0]> (low)
    up_gradient = MatMul (low_turned, z_gradient)
    up_turned = Transpose <perm = [1, 0]> (up)
    low_gradient = MatMul (z_gradient, up_turned)
    x_turned = Transpose <perm = [1, 0]> (x)
    down_gradient = MatMul (x_turned, low_gradient)
}}
"""


def build(folder: Path) -> str:
    """Write `step.onnx` and `arrays.npz`: its frozen weights, a batch, a first adapter."""
    import numpy as np
    import onnx

    random = np.random.default_rng(0)

    def normal(*shape: int) -> NDArray[np.float32]:
        return random.normal(scale=shape[0] ** -0.5, size=shape).astype(np.float32)

    frozen = {"table": normal(VOCABULARY, HIDDEN) * 30, "weight": normal(HIDDEN, HIDDEN)}
    lengths = random.integers(1, TOKENS + 1, size=(BATCH, 1))
    batch = {
        "input_ids": random.integers(0, VOCABULARY, size=(BATCH, TOKENS)),
        "attention_mask": (np.arange(TOKENS) < lengths).astype(np.int64),
        "labels": random.integers(0, CLASSES, size=BATCH),
    }
    adapter = {
        "down": normal(HIDDEN, RANK),
        "up": normal(RANK, HIDDEN),
        "head": normal(HIDDEN, CLASSES),
    }
    model = onnx.parser.parse_model(GRAPH)
    for name, values in frozen.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / "step.onnx")
    np.savez(folder / "arrays.npz", allow_pickle=False, **frozen, **batch, **adapter)
    return f"{len(model.graph.node)} operators, {(folder / 'step.onnx').stat().st_size:,} bytes"


def reference(arrays: Arrays) -> Arrays:
    """The loss and gradients of `GRAPH` in float64 by numpy, under the names of its outputs."""
    import numpy as np

    table, weight, down, up, head = (
        arrays[name].astype(np.float64) for name in ("table", "weight", "down", "up", "head")
    )
    mask = arrays["attention_mask"].astype(np.float64)
    x = np.einsum("bt,bth->bh", mask, table[arrays["input_ids"]]) / mask.sum(1, keepdims=True)
    y = np.tanh(x @ (weight + down @ up))
    odds = np.exp(y @ head)
    probabilities = odds / odds.sum(1, keepdims=True)
    target = np.eye(CLASSES)[arrays["labels"]]
    logits_gradient = (probabilities - target) / len(target)
    z_gradient = logits_gradient @ head.T * (1 - y**2)
    return {
        "loss": -np.log((probabilities * target).sum(1)).mean(),
        "down_gradient": x.T @ (z_gradient @ up.T),
        "up_gradient": (x @ down).T @ z_gradient,
        "head_gradient": y.T @ logits_gradient,
    }


def step(folder: Path) -> str:
    """Train the adapter by gradient descent, each step of it compared with `reference`."""
    import numpy as np
    import onnxruntime

    with np.load(folder / "arrays.npz", allow_pickle=False) as file:
        arrays: Arrays = dict(file)
    session = onnxruntime.InferenceSession(folder / "step.onnx", providers=["CPUExecutionProvider"])
    inputs = [item.name for item in session.get_inputs()]
    outputs = [item.name for item in session.get_outputs()]
    losses = []
    worst = seconds = 0.0
    for number in range(1, STEPS + 1):
        began = time.perf_counter()
        found = dict(
            zip(outputs, session.run(None, {name: arrays[name] for name in inputs}), strict=True)
        )
        seconds += time.perf_counter() - began
        for name, expected in reference(arrays).items():
            difference = float(np.abs(found[name] - expected).max() / np.abs(expected).max())
            if not difference <= TOLERANCE:  # also when it is not a number
                raise SystemExit(
                    f"step {number}: {name} differs from numpy's by {difference:.1e} of its largest"
                )
            worst = max(worst, difference)
        losses.append(float(found["loss"]))
        for name in ("down", "up", "head"):
            arrays[name] = arrays[name] - np.float32(LEARNING_RATE) * found[f"{name}_gradient"]
    if not losses[-1] < losses[0] / 2:
        raise SystemExit(f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}: nothing learned")
    return (
        f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {STEPS} steps of {seconds / STEPS:.3f} s, "
        f"at most {worst:.0e} from numpy"
    )


def import_compiled(packages: Path, distribution: str) -> str:
    """Load each shared library of an installed distribution, and import those that are modules.

    Fails for a library that a kernel with larger pages than this one's could not load.
    """
    found = importlib.metadata.distribution(distribution)
    files = [file for file in found.files or () if ".so" in file.suffixes]
    modules = 0
    for file in files:
        library = ctypes.CDLL(str(packages / file))
        name = file.name.partition(".")[0]
        if hasattr(library, f"PyInit_{name}") and "tests" not in file.parts:
            importlib.import_module(".".join([*file.parts[:-1], name]))
            modules += 1
    page = min(_alignment(packages / file) for file in files)
    if page < LARGEST_PAGE:
        raise SystemExit(f"a library cannot be loaded with pages of more than {page} bytes")
    lines = (found.read_text("WHEEL") or "").splitlines()
    platforms = sorted(line.rpartition("-")[2] for line in lines if line.startswith("Tag:"))
    return (
        f"{found.version} {platforms[0]}, {len(files)} libraries, {modules} modules, "
        f"pages of up to {page // 1024} KiB"
    )


def _alignment(library: Path) -> int:
    """The largest page in bytes with which a 64-bit little-endian ELF library can be loaded."""
    data = library.read_bytes()
    (start,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    headers = [struct.unpack_from("<II6Q", data, start + index * size) for index in range(count)]
    alignments: list[int] = [header[7] for header in headers if header[0] == 1]  # PT_LOAD
    return min(alignments)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["build", folder]:
            print(build(Path(folder)))
        case ["import", packages, distribution]:
            print(import_compiled(Path(packages), distribution))
        case ["step", folder]:
            print(step(Path(folder)))
        case _:
            raise SystemExit(__doc__)
