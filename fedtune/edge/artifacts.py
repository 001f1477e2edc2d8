"""What `fedtune edge build` made, as a device reads it: a manifest that names each file's SHA-256.

Nothing is used before it was found to be what the manifest says. Whether the manifest is the right
one, the site knows from its digest, which comes on another way than the files (`[machine]
artifacts-digest`).
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from fedtune.errors import ArtifactError
from fedtune.types import Float32Vector, Manifest, Task, digest_of, sha256_hex

if TYPE_CHECKING:
    from fedtune.config import Config  # 7 MB that training does without

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
REFERENCE = "reference.safetensors"
INITIAL = "initial.safetensors"
BASE = "base.bin"
TRAINING, CHECKPOINT = "training.onnx", "checkpoint"
STEP, FORWARD = "step.onnx", "forward.onnx"
ENCODER, CONNECTOR, VOCABULARY = "encoder.onnx", "connector.onnx", "vocabulary.safetensors"
LARGEST_MANIFEST = 4 << 20  # bytes

Precision = Literal["float32", "int8"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# A part of a path that leaves no folder.
FileName = Annotated[str, Field(pattern=r"^([a-z0-9]+/)?[a-z0-9]+(\.[a-z]+)?$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileEntry(_Part):
    """One file; SHA-256 in hexadecimal."""

    size: int = Field(ge=0)
    sha256: Sha256


class Tensor(_Part):
    """Name and shape of one float32 tensor of the adapter."""

    name: str
    shape: tuple[int, ...]


class Value(_Part):
    """An input or output of a graph; a dimension is a number or a name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class GraphEntry(_Part):
    """What a graph takes and gives, and which runtimes load it."""

    opset: int
    ir_version: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


class Memory(_Part):
    """Peak memory of a training step, measured where the artifacts were built, in bytes.

    `fixed` + rows · tokens · `per_token` + rows · tokens² · `per_pair`, above what the process had
    before the model was loaded.
    """

    fixed: float
    per_token: float
    per_pair: float

    def peak(self, rows: int, tokens: int) -> float:
        """Bytes for a micro-batch of `rows` texts of `tokens` tokens."""
        return self.fixed + rows * tokens * self.per_token + rows * tokens**2 * self.per_pair


class Cut(_Part):
    """What a device knows of a base model that stays at the server, and of what is before it."""

    encoder_digest: Sha256
    connector_digest: Sha256
    features: int = Field(ge=1)
    """Values that the image encoder makes of an image."""
    image_tokens: int = Field(ge=1)
    width: int = Field(ge=1)
    """Length of an embedding."""
    answer_tokens: tuple[int, ...]
    """The token with which each answer begins."""

    def digest(self, base_digest: str) -> str:
        """SHA-256 of all that is frozen, as a client with PyTorch has it."""
        parts = [base_digest, self.encoder_digest, self.connector_digest, [*self.answer_tokens]]
        return digest_of(parts)


class EdgeManifest(_Part):
    """The contents of manifest.json."""

    format: Literal[1]
    base_digest: Sha256
    seed: int = Field(ge=0)
    """Of the initial adapter, from which training without gradients starts."""
    agreed: Sha256
    """Digest of what of the configuration is in the graphs, see `agreed_digest`."""
    adapter: tuple[Tensor, ...]
    task: Task
    outputs: int = Field(ge=2)
    """Labels of a classifier; tokens in the vocabulary of a language model."""
    max_length: int = Field(ge=2)
    pad_id: int = Field(ge=0)
    end_id: int | None = Field(ge=0)
    """The token with which a text ends, where the tokenizer does not say so by itself."""
    dropout: float = Field(ge=0, lt=1)
    cut: Cut | None = None
    """Where the base model stays at the server."""
    built_with: dict[str, str]
    graphs: dict[FileName, GraphEntry]
    memory: dict[str, Memory]
    files: dict[FileName, FileEntry]


def agreed_digest(config: Config) -> str:
    """SHA-256 of what of a configuration decides the graphs."""
    base = config.base
    return digest_of(
        {
            "adapter": config.adapter.model_dump(mode="json", exclude={"private"}),
            "task": base.task,
            "pooling": base.pooling,
            "max-length": base.max_length,
            "labels": len(config.data.labels),
        }
    )


class EdgeArtifacts:
    """A folder of artifacts."""

    def __init__(self, folder: Path, digest: str | None = None) -> None:
        """Read the manifest, which must have this digest if one is given.

        Raises `ArtifactError`.
        """
        self.folder = folder
        content = _read(folder / MANIFEST, LARGEST_MANIFEST)
        self.digest = sha256_hex(content)
        if digest is not None and not hmac.compare_digest(self.digest, digest):
            raise ArtifactError(
                f"{folder / MANIFEST}: its digest is {self.digest}, artifacts-digest says {digest}"
            )
        try:
            self.manifest = EdgeManifest.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ArtifactError(
                f"{folder / MANIFEST}: {where}: {first['msg']}; build it again with this version"
            ) from error
        self.tensors = Manifest.of((t.name, t.shape) for t in self.manifest.adapter)
        self._checked: set[str] = set()

    def check(self, config: Config) -> None:
        """Raise `ArtifactError` if they were built for another federation."""
        found = self.manifest
        if config.base.digest is not None and found.base_digest != config.base.digest:
            raise ArtifactError(
                f"{self.folder}: built from the base model {found.base_digest}, base.digest is "
                f"{config.base.digest}"
            )
        if found.agreed != agreed_digest(config):
            raise ArtifactError(
                f"{self.folder}: built for another adapter, task, pooling, max-length or number of "
                "labels than the federation has; build them from its federation.toml"
            )
        connector = config.base.connector_digest
        if found.cut is not None and connector not in {None, found.cut.connector_digest}:
            raise ArtifactError(
                f"{self.folder}: built from the connector {found.cut.connector_digest}, "
                f"base.connector-digest is {connector}"
            )
        from_seed = config.train.method == "forward-only" or config.adapter.private
        if from_seed and found.seed != config.seed:
            raise ArtifactError(
                f"{self.folder}: their initial adapter is of seed {found.seed}, the federation's "
                f"of {config.seed}; build them from its federation.toml"
            )

    def path(self, name: str) -> Path:
        """A file, which is what the manifest says; raises `ArtifactError`.

        For a graph, the weights that it refers to are looked at too.
        """
        folder, _, last = name.rpartition("/")
        if last.endswith(".onnx"):
            self.path(f"{folder}/{BASE}")
        if name not in self.manifest.files:
            raise ArtifactError(f"{self.folder}: there is no {name} in the manifest")
        path = self.folder / name
        if name not in self._checked:
            check_file(path, self.manifest.files[name])
            self._checked.add(name)
        return path

    @property
    def cut(self) -> Cut:
        """What is in front of a base model at the server; raises `ArtifactError`."""
        if self.manifest.cut is None:
            raise ArtifactError(
                f"{self.folder}: they hold a base model, not what is in front of it"
            )
        return self.manifest.cut

    def vocabulary(self) -> NDArray[np.int64]:
        """The tokens that have an embedding, ascending, in the table's order; int64 `[rows]`."""
        return self._tensors(VOCABULARY)["tokens"].astype(np.int64)

    def reference(self) -> dict[str, Float32Vector]:
        """What torch computed where the artifacts were built, see `edge.verify`."""
        return self._tensors(REFERENCE)

    def initial(self) -> Float32Vector:
        """The adapter as the seed has it, float32 `[tensors.size]`; raises `ArtifactError`."""
        try:
            return self.tensors.join(self._tensors(INITIAL))
        except ValueError as error:
            raise ArtifactError(f"{self.folder / INITIAL}: {error}") from error

    def _tensors(self, name: str) -> dict[str, Float32Vector]:
        path = self.path(name)
        try:
            tensors = load_tensors(path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{path}: cannot be read: {error}") from error
        return {name: np.asarray(value) for name, value in tensors.items()}


def _read(path: Path, largest: int) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot be read: {error.strerror}; make it with: fedtune edge build"
        ) from error
    if len(content) > largest:
        raise ArtifactError(f"{path}: larger than {largest >> 20} MiB")
    return content


def check_file(path: Path, entry: FileEntry) -> None:
    """Raise `ArtifactError` if the file is not what the manifest says."""
    try:
        size = path.stat().st_size
        if size != entry.size:
            raise ArtifactError(f"{path}: {size} bytes, the manifest says {entry.size}")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
    if not hmac.compare_digest(found, entry.sha256):
        raise ArtifactError(
            f"{path}: its SHA-256 is {found}, the manifest says {entry.sha256}; it has changed "
            "since it was built"
        )
