"""One file of frozen weights for all graphs of a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from onnx import TensorProto, numpy_helper

FILE = "base.bin"
SMALLEST = 1024  # bytes of a weight that leaves its graph
_PAGE = 4096


def write_graphs(
    models: Iterable[tuple[str, onnx.ModelProto]], folder: Path
) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Write the graphs, and each weight once into `base.bin`, from where it can be mapped.

    Yields each graph when it is written, without its weights.
    """
    places: dict[bytes, tuple[int, int]] = {}
    end = 0
    with (folder / FILE).open("wb") as file:
        for name, model in models:
            for tensor in model.graph.initializer:
                content = (
                    tensor.raw_data
                    if tensor.HasField("raw_data")
                    else numpy_helper.to_array(tensor).tobytes()
                )
                if len(content) < SMALLEST:
                    continue
                digest = hashlib.sha256(content).digest()
                if digest not in places:
                    file.write(b"\0" * (-end % _PAGE))
                    end += -end % _PAGE
                    places[digest] = (end, len(content))
                    file.write(content)
                    end += len(content)
                _point(tensor, *places[digest])
            (folder / name).write_bytes(model.SerializeToString(deterministic=True))
            yield name, model


def _point(tensor: TensorProto, offset: int, length: int) -> None:
    for field in ("float_data", "int32_data", "int64_data", "raw_data", "external_data"):
        tensor.ClearField(field)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", FILE), ("offset", offset), ("length", length)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
