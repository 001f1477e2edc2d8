"""`fedtune edge build`: a folder of artifacts from a federation's configuration."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import get_args

import onnx
from onnx import TensorProto, helper
from safetensors.numpy import save

from fedtune.base.causal import CausalBase
from fedtune.config import Config
from fedtune.edge import artifacts as files
from fedtune.edge.artifacts import EdgeManifest, FileEntry, GraphEntry, Memory, Precision, Value
from fedtune.edge.build.forward import LABELLED, export_forward
from fedtune.edge.build.gradients import add_cross_entropy, add_gradients
from fedtune.edge.build.graph import Graph
from fedtune.edge.build.int8 import quantize
from fedtune.edge.build.memory import measure
from fedtune.edge.build.model import EdgeModel
from fedtune.edge.build.reference import make_reference
from fedtune.edge.build.schedule import order
from fedtune.edge.build.shared import write_graphs
from fedtune.edge.build.training import make_training
from fedtune.edge.engines import gradient_name
from fedtune.edge.runtime import installed_builds
from fedtune.errors import ArtifactError, BaseModelError
from fedtune.files import sync_folder, write_atomic
from fedtune.types import Manifest

Say = Callable[[str], None]
LABELS = "labels"
LARGEST_MODEL = 1 << 31  # bytes; a graph is handled as one protobuf message with its weights
_BUILT_WITH = ("fedtune", "torch", "transformers", "peft", "onnx", "onnxscript")


def build(config: Config, model: EdgeModel, out: Path, say: Say) -> EdgeManifest:
    """Write the artifacts to `out`, as `write_folder` does.

    Raises `ArtifactError`, or `BaseModelError` if the model cannot be exported.
    """
    return write_folder(out, lambda folder: _build(config, model, folder, say))


def write_folder(out: Path, write: Callable[[Path], EdgeManifest]) -> EdgeManifest:
    """What `write` puts into a folder, as the new folder `out`: there whole or not at all.

    Raises `ArtifactError` if the folder is there.
    """
    if out.exists():
        raise ArtifactError(f"{out}: is there already; name a new folder, or remove it first")
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        manifest = write(part)
        write_atomic(part / files.MANIFEST, manifest.model_dump_json(indent=1).encode())
        part.replace(out)
        sync_folder(out.parent)
    except OSError as error:
        raise ArtifactError(f"{part}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return manifest


def _build(config: Config, model: EdgeModel, out: Path, say: Say) -> EdgeManifest:
    dropout = config.adapter.dropout
    adapter = model.adapter
    if (size := model.base.parameters * 4) >= LARGEST_MODEL:
        raise BaseModelError(
            f"base model {model.base.name}: {size / 1e9:.1f} GB of weights in float32; artifacts "
            f"can be built of less than {LARGEST_MODEL / 1e9:.1f} GB"
        )
    say("exporting the model with its adapter")
    forward = export_forward(adapter, model.task, training=False)
    stochastic = export_forward(adapter, model.task, training=True) if dropout else forward
    tensors = adapter.manifest.split(adapter.read())
    say("building the gradients")
    training, checkpoint = make_training(stochastic, tensors)
    graphs = {
        files.FORWARD: forward,
        files.TRAINING: training,
        files.STEP: make_step(stochastic, list(tensors)),
    }
    entries: dict[str, GraphEntry] = {}
    for precision in get_args(Precision):
        say(f"writing the graphs in {precision}")
        folder = out / precision
        folder.mkdir()
        (folder / files.CHECKPOINT).write_bytes(checkpoint)
        finished = _finish(graphs, precision, set(tensors))
        for name, graph in write_graphs(finished, folder):
            entries[f"{precision}/{name}"] = describe(graph)
    model.base.tokenizer.backend_tokenizer.save(str(out / files.TOKENIZER))
    (out / files.INITIAL).write_bytes(save(tensors))
    say("computing what PyTorch makes of it")
    make_reference(model, _outputs(config, model), out / files.REFERENCE, config.seed)
    say("measuring how much memory a step takes")
    memory = measure(out, model.task, adapter.manifest, model.max_length)
    return _manifest(config, model, out, entries, memory)


def _finish(
    graphs: Mapping[str, onnx.ModelProto], precision: Precision, adapter: Collection[str]
) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The graphs in a precision, one after the other: each holds all weights."""
    for name, whole in graphs.items():
        graph = copy_of(whole)
        if precision == "int8":
            quantize(graph, adapter)
        order(graph, LABELS)
        strip(graph)
        yield name, graph


def make_step(forward: onnx.ModelProto, adapter: list[str]) -> onnx.ModelProto:
    """The step graph of a forward graph: `loss`, and the gradient by each adapter tensor."""
    model = copy_of(forward)
    model.graph.input.append(helper.make_tensor_value_info(LABELS, TensorProto.INT64, [LABELLED]))
    graph = Graph(model)
    loss, slope = add_cross_entropy(graph, "logits", LABELS)
    del model.graph.output[:]
    graph.publish(loss, TensorProto.FLOAT, ())
    publish_gradients(graph, {"logits": slope}, adapter)
    return model


def publish_gradients(graph: Graph, slopes: Mapping[str, str], adapter: Sequence[str]) -> None:
    """Make the gradients by these tensors outputs, and take out what no output needs.

    `slopes` has the gradient by each of the model's own outputs.
    """
    gradients = add_gradients(graph, slopes, adapter)
    for name in adapter:
        shape = graph.shape(name)
        output = graph.add("Identity", [gradients[name]], shape, output=gradient_name(name))
        graph.publish(output, TensorProto.FLOAT, shape)
    graph.prune()


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def strip(model: onnx.ModelProto) -> None:
    """Take out what the exporter tells of itself and of the files of this machine."""
    del model.graph.value_info[:], model.metadata_props[:]
    model.doc_string = model.graph.doc_string = ""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]
        tensor.doc_string = ""


def describe(model: onnx.ModelProto) -> GraphEntry:
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    return GraphEntry(
        opset=opsets.get("", opsets.get("ai.onnx", 0)),
        ir_version=model.ir_version,
        inputs=tuple(_value(value) for value in model.graph.input),
        outputs=tuple(_value(value) for value in model.graph.output),
    )


def _value(value: onnx.ValueInfoProto) -> Value:
    kind = value.type.tensor_type
    return Value(
        name=value.name,
        dtype=TensorProto.DataType.Name(kind.elem_type).lower(),
        shape=tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim),
    )


def _outputs(config: Config, model: EdgeModel) -> int:
    return model.base.config.vocab_size if model.task == "causal-lm" else len(config.data.labels)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(
    config: Config,
    model: EdgeModel,
    out: Path,
    graphs: Mapping[str, GraphEntry],
    memory: Mapping[str, Memory],
) -> EdgeManifest:
    return EdgeManifest(
        format=1,
        base_digest=model.base.digest,
        seed=config.seed,
        agreed=files.agreed_digest(config),
        adapter=list_tensors(model.adapter.manifest),
        task=model.task,
        outputs=_outputs(config, model),
        max_length=model.max_length,
        pad_id=model.pad_id,
        end_id=model.base.end_id if isinstance(model.base, CausalBase) else None,
        dropout=config.adapter.dropout,
        built_with=built_with(),
        graphs=dict(graphs),
        memory=dict(memory),
        files=list_files(out),
    )


def built_with() -> dict[str, str]:
    """The versions of what takes part."""
    return {name: metadata.version(name) for name in _BUILT_WITH} | installed_builds()


def list_tensors(manifest: Manifest) -> tuple[files.Tensor, ...]:
    """An adapter's tensors, as the artifacts' manifest has them."""
    return tuple(files.Tensor(name=tensor.name, shape=tensor.shape) for tensor in manifest.tensors)


def list_files(out: Path) -> dict[str, FileEntry]:
    """All that was written, as the manifest has it."""
    return {
        path.relative_to(out).as_posix(): FileEntry(size=path.stat().st_size, sha256=_sha256(path))
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }
