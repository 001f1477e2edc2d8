"""`fedtune edge build` for NanoAdapters: a client's half of the model, without the base model.

It is made of the federation's configuration and a client's kit, so whoever has the kit can build
it: no weight of the decoder's layers is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from safetensors.numpy import save
from torch import Tensor, nn

from fedtune.adapter.lora import AttachedAdapter
from fedtune.adapter.nano import ClientHalf
from fedtune.base.kit import ClientKit, Table
from fedtune.config import Config
from fedtune.edge import artifacts as files
from fedtune.edge import nano, questions
from fedtune.edge.artifacts import Cut, EdgeManifest, GraphEntry
from fedtune.edge.build.artifacts import (
    Say,
    built_with,
    copy_of,
    describe,
    list_files,
    list_tensors,
    publish_gradients,
    strip,
    write_folder,
)
from fedtune.edge.build.forward import BATCH, LONGEST, TOKENS, export
from fedtune.edge.build.graph import Graph
from fedtune.edge.build.nano_half import Half
from fedtune.edge.build.nano_reference import make_nano_reference
from fedtune.edge.build.shared import write_graphs
from fedtune.errors import ConfigError

_TALLEST = 4096  # pixels of an image that is exported for


class _Adapted(nn.Module):
    """Behind connector and table: where NanoAdapters begin."""

    def __init__(self, half: ClientHalf, table: Table) -> None:
        super().__init__()
        self.front, self.table = half, table

    def forward(self, image: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        return self.front.nano_image(image), self.front.nano_text(self.table.weight[places])


class _AdapterAsInputs(nn.Module):
    """The same as a function of the adapter's tensors too."""

    def __init__(self, half: Half) -> None:
        super().__init__()
        self.module = _Adapted(half.module, half.table)
        self._names = [f"front.{name}" for name in half.adapter.parameter_names()]

    def forward(
        self, image: Tensor, places: Tensor, adapter: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        values = dict(zip(self._names, adapter, strict=True))
        adapted: tuple[Tensor, Tensor] = torch.func.functional_call(
            self.module, values, (image, places)
        )
        return adapted


def build_nano(config: Config, kit: ClientKit, out: Path, say: Say) -> EdgeManifest:
    """Write the artifacts to `out`, a new folder, which is there whole or not at all.

    Raises `ArtifactError`, `ConfigError`, or `BaseModelError` for what cannot be loaded or
    exported.
    """
    if config.rungs:
        raise ConfigError(
            "artifacts are of NanoAdapters at the base model's input: a gray box "
            "(adapter.output-rank) or a ladder trains with PyTorch only"
        )
    half = Half(config, kit)
    return write_folder(out, lambda folder: _build(config, kit, half, folder, say))


def _build(config: Config, kit: ClientKit, half: Half, out: Path, say: Say) -> EdgeManifest:
    folder = out / nano.PRECISION
    folder.mkdir()
    entries: dict[str, GraphEntry] = {}
    for name, graph in write_graphs(_graphs(half, say), folder):
        entries[f"{nano.PRECISION}/{name}"] = describe(graph)
    half.tokenizer.backend_tokenizer.save(str(out / files.TOKENIZER))
    (out / files.VOCABULARY).write_bytes(save({"tokens": half.table.tokens.numpy()}))
    initial = half.adapter.manifest.split(half.adapter.read())
    (out / files.INITIAL).write_bytes(save(initial))
    say("computing what PyTorch makes of it")
    make_nano_reference(half, out / files.REFERENCE, config.seed)
    return EdgeManifest(
        format=1,
        base_digest=kit.manifest.base_digest,
        seed=config.seed,
        agreed=files.agreed_digest(config),
        adapter=list_tensors(half.adapter.manifest),
        task=config.base.task,
        outputs=len(half.answers),
        max_length=half.max_length,
        pad_id=kit.manifest.pad_id,
        end_id=None,
        dropout=0,
        cut=Cut(
            encoder_digest=half.encoder.digest,
            connector_digest=half.connector_digest,
            features=half.connector.features,
            image_tokens=half.connector.tokens,
            width=half.connector.width,
            answer_tokens=tuple(half.answers.tolist()),
        ),
        built_with=built_with(),
        graphs=entries,
        memory={},
        files=list_files(out),
    )


def _graphs(half: Half, say: Say) -> Iterator[tuple[str, onnx.ModelProto]]:
    say("exporting the image encoder and the connector")
    yield files.ENCODER, _finished(_export_encoder(half))
    yield files.CONNECTOR, _finished(_export_connector(half))
    say("exporting the adapters and building their gradients")
    forward = export_adapters(half)
    yield files.FORWARD, _finished(copy_of(forward))
    yield files.STEP, _finished(make_nano_step(forward, half.adapter))


def _finished(model: onnx.ModelProto) -> onnx.ModelProto:
    strip(model)
    return model


def _export_encoder(half: Half) -> onnx.ModelProto:
    """With the scaling of the image in it, as torch does it."""
    sides = {
        place: torch.export.Dim(name, min=1, max=_TALLEST)
        for place, name in enumerate(("height", "width"))
    }
    pixels = torch.zeros((48, 64, 3), dtype=torch.uint8)
    module = half.encoder.of_one_image()
    return export(module, (pixels,), [questions.PIXELS], [questions.FEATURES], (sides,))


def _export_connector(half: Half) -> onnx.ModelProto:
    rows = {0: torch.export.Dim(BATCH, min=1, max=LONGEST)}
    features = torch.zeros((3, half.connector.features))
    names = [questions.FEATURES], [questions.TOKENS]
    return export(half.connector, (features,), *names, (rows,))


def export_adapters(half: Half) -> onnx.ModelProto:
    """Tokens of images and places in the table, and the adapter's tensors, to embeddings."""
    manifest = half.adapter.manifest
    names = [tensor.name for tensor in manifest.tensors]
    tensors = [torch.from_numpy(view) for view in manifest.split(half.adapter.read()).values()]
    image = torch.zeros((3, half.connector.tokens, half.connector.width))
    batch = torch.export.Dim(BATCH, min=1, max=LONGEST)
    tokens = torch.export.Dim(TOKENS, min=1, max=LONGEST)
    return export(
        _AdapterAsInputs(half),
        (image, torch.zeros((3, 5), dtype=torch.int64), tensors),
        [nano.IMAGE, nano.PLACES, *names],
        [nano.ADAPTED_IMAGE, nano.ADAPTED_TEXT],
        ({0: batch}, {0: batch, 1: tokens}, [None] * len(names)),
    )


def make_nano_step(forward: onnx.ModelProto, adapter: AttachedAdapter) -> onnx.ModelProto:
    """The graph of the gradients by the adapter, given those by its outputs as inputs."""
    model = copy_of(forward)
    slopes = {nano.ADAPTED_IMAGE: nano.IMAGE_SLOPE, nano.ADAPTED_TEXT: nano.TEXT_SLOPE}
    for value in model.graph.output:
        slope = model.graph.input.add()
        slope.CopyFrom(value)
        slope.name = slopes[value.name]
    graph = Graph(model)
    del model.graph.output[:]
    publish_gradients(graph, slopes, [tensor.name for tensor in adapter.manifest.tensors])
    return model
