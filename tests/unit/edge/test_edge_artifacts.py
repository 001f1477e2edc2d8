"""What a device accepts as artifacts: whole, agreed upon, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import pytest

from fedtune.config import parse_config
from fedtune.edge.artifacts import EdgeArtifacts
from fedtune.edge.build.graph import IR_VERSION, OPSET
from fedtune.edge.devices import check_files, fit
from fedtune.edge.engines import gradient_name
from fedtune.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from edge_built import Built

FILES = [
    "float32/base.bin",
    "float32/training.onnx",
    "float32/checkpoint",
    "float32/step.onnx",
    "float32/forward.onnx",
    "tokenizer.json",
    "reference.safetensors",
]


@pytest.fixture
def copy(tiny: Built, tmp_path: Path) -> Path:
    """Artifacts that may be spoiled."""
    return Path(shutil.copytree(tiny.folder, tmp_path / "artifacts"))


def _use(folder: Path, name: str) -> None:
    artifacts = EdgeArtifacts(folder)
    artifacts.path(name)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("spoil", [_flip, _truncate, _lengthen, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_changed_is_refused(
    copy: Path, name: str, spoil: Callable[[Path], None]
) -> None:
    _use(copy, name)
    spoil(copy / name)
    with pytest.raises(ArtifactError, match=name.rpartition("/")[2]):
        _use(copy, name)


def test_a_graph_is_refused_when_its_weights_were_changed(copy: Path) -> None:
    _flip(copy / "int8/base.bin")
    for name in ("training.onnx", "step.onnx", "forward.onnx"):
        with pytest.raises(ArtifactError, match=r"base\.bin"):
            _use(copy, f"int8/{name}")


def test_files_that_were_swapped_are_refused(copy: Path) -> None:
    first, second = copy / "float32/step.onnx", copy / "int8/step.onnx"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    for runtime in ("float32", "int8"):
        with pytest.raises(ArtifactError, match=r"step\.onnx"):
            check_files(EdgeArtifacts(copy), "stepgraph", runtime)


def test_only_what_a_runtime_needs_must_be_there(copy: Path) -> None:
    (copy / "float32/training.onnx").unlink()
    check_files(EdgeArtifacts(copy), "stepgraph", "float32")
    with pytest.raises(ArtifactError, match=r"training\.onnx"):
        check_files(EdgeArtifacts(copy), "ort", "float32")


def test_another_manifest_than_the_one_told_of_is_refused(copy: Path) -> None:
    digest = EdgeArtifacts(copy).digest
    assert EdgeArtifacts(copy, digest).digest == digest
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["pad_id"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    EdgeArtifacts(copy)
    with pytest.raises(ArtifactError, match="artifacts-digest says"):
        EdgeArtifacts(copy, digest)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(format=2),
        lambda m: m.update(extra=1),
        lambda m: m["files"].update({"../../etc/passwd": {"size": 1, "sha256": "0" * 64}}),
        lambda m: m["files"].update({"/etc/passwd": {"size": 1, "sha256": "0" * 64}}),
        lambda m: m["files"].update({"a/b/c": {"size": 1, "sha256": "0" * 64}}),
        lambda m: m["files"]["tokenizer.json"].update(sha256="A" * 64),
        lambda m: m["files"]["tokenizer.json"].update(size=-1),
        lambda m: m.update(labels=1),
        lambda m: m.pop("adapter"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(
    copy: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        EdgeArtifacts(copy)


def test_a_manifest_without_end_is_not_read(copy: Path) -> None:
    (copy / "manifest.json").write_bytes(b" " * ((4 << 20) + 1))
    with pytest.raises(ArtifactError, match="larger than 4 MiB"):
        EdgeArtifacts(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="fedtune edge build"):
        EdgeArtifacts(copy)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("adapter.rank=4", "another adapter"),
        ("adapter.alpha=8", "another adapter"),
        ('base.pooling="cls"', "another adapter"),
        ("base.max-length=32", "another adapter"),
        ('data.labels=["a","b"]', "another adapter"),
        (f'base.digest="{"0" * 64}"', "base.digest is"),
    ],
)
def test_artifacts_of_another_federation_are_refused(
    tiny: Built, override: str, reason: str
) -> None:
    agreed = [f'base.path="{tiny.config.base.path}"', "base.max-length=64"]
    own = parse_config("", "test", ['data.labels=["a","b","c"]', *agreed, "train.lr=1"])
    tiny.artifacts.check(own)
    other = parse_config("", "test", ['data.labels=["a","b","c"]', *agreed, override])
    with pytest.raises(ArtifactError, match=reason):
        tiny.artifacts.check(other)


def test_graphs_are_for_the_runtimes_that_load_them(tiny: Built) -> None:
    names = [t.name for t in tiny.model.adapter.manifest.tensors]
    for precision in ("float32", "int8"):
        for name in ("training", "step", "forward"):
            path = tiny.folder / precision / f"{name}.onnx"
            model = onnx.load(path, load_external_data=False)
            assert model.ir_version <= IR_VERSION
            domains = {entry.domain: entry.version for entry in model.opset_import}
            assert domains[""] <= OPSET
            if name != "training":  # nothing that only some builds have
                assert {node.domain for node in model.graph.node} == {""}
            entry = tiny.artifacts.manifest.graphs[f"{precision}/{name}.onnx"]
            assert [value.name for value in entry.inputs] == [v.name for v in model.graph.input]
            text = path.read_bytes()
            assert str(Path.home()).encode() not in text
            assert b"/site-packages/" not in text
        step = tiny.artifacts.manifest.graphs[f"{precision}/step.onnx"]
        inputs = [value.name for value in step.inputs]
        assert inputs == ["input_ids", "attention_mask", *names, "labels"]
        assert [v.name for v in step.outputs] == ["loss", *(gradient_name(n) for n in names)]


def test_names_and_shapes_are_those_that_peft_has(tiny: Built) -> None:
    """Also of the B matrices, which are all zeros and must not have become one."""
    assert tiny.artifacts.tensors == tiny.model.adapter.manifest
    tensors = tiny.model.adapter.manifest.split(tiny.model.adapter.read())
    zeros = [name for name in tensors if "lora_B" in name]
    assert len(zeros) == 4
    assert not any(tensors[name].any() for name in zeros)


def test_a_build_that_is_there_is_not_overwritten(
    copy: Path, tiny: Built, build_artifacts: Callable[..., Any]
) -> None:
    with pytest.raises(ArtifactError, match="is there already"):
        build_artifacts(copy, f'base.path="{tiny.config.base.path}"')
    assert EdgeArtifacts(copy).digest == tiny.artifacts.digest
    assert not copy.with_name("artifacts.part").exists()


def test_rows_are_given_up_before_texts_are_cut(tiny: Built) -> None:
    memory = tiny.artifacts.manifest.memory["ort/int8"]
    whole = memory.peak(8, 64)
    assert fit(memory, whole, 8, 64) == (8, 64)
    assert fit(memory, memory.peak(3, 64), 8, 64) == (3, 64)
    assert fit(memory, memory.peak(1, 64) - 1, 8, 64) == (1, 63)
    assert fit(memory, memory.peak(1, 16), 8, 64) == (1, 16)
    with pytest.raises(ConfigError, match="max-memory-mb leaves"):
        fit(memory, memory.peak(1, 16) - 1, 8, 64)
