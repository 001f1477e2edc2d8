"""What a client needs of a language model that it does not hold: a tokenizer and embeddings.

An operator makes the kit once, a client gets it with the federation's files. It has the rows of
the table of embeddings for a vocabulary, and the connector; not one weight of the decoder's layers,
unless clients train against an emulator, which has some. For clients that make scores of states,
also its output layer's rows for the answers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor, nn

from fedtune.base.answering import Head
from fedtune.base.causal import CausalBase
from fedtune.base.loading import load_tokenizer
from fedtune.errors import BaseModelError
from fedtune.files import write_atomic, write_json
from fedtune.types import sha256_hex

MANIFEST, EMBEDDINGS, CONNECTOR = "kit.json", "embeddings.safetensors", "connector.safetensors"
TOKENIZER, EMULATOR, HEAD = "tokenizer", "emulator", "head.safetensors"
_LARGEST_FILE = 4 << 30


@dataclass(frozen=True)
class KitManifest:
    """What is in a kit: `files` by name with their SHA-256, and of which base model they are."""

    base: str
    base_digest: str
    max_tokens: int
    pad_id: int
    files: dict[str, str]


class Table(nn.Module):
    """Some rows of a table of embeddings, found by token."""

    tokens: Tensor
    weight: Tensor

    def __init__(self, tokens: NDArray[np.int64], weight: NDArray[np.float32]) -> None:
        """`tokens` are int64 `[rows]`, ascending; `weight` float32 `[rows, width]`."""
        super().__init__()
        self.register_buffer("tokens", torch.from_numpy(tokens))
        self.register_buffer("weight", torch.from_numpy(weight))

    @property
    def embedding_dim(self) -> int:
        """Length of an embedding."""
        return self.weight.shape[1]

    def lacking(self, ids: NDArray[np.int32]) -> list[int]:
        """The tokens that have no row here."""
        return [int(token) for token in np.setdiff1d(ids, self.tokens.numpy())]

    def forward(self, ids: Tensor) -> Tensor:
        """int64 `[...]` → float32 `[..., width]`; zeros for a token without a row."""
        places = torch.searchsorted(self.tokens, ids).clamp(max=len(self.tokens) - 1)
        known = (self.tokens[places] == ids)[..., None]
        return self.weight[places] * known


class ClientKit:
    """A kit in a folder."""

    def __init__(self, folder: Path, digest: str | None = None) -> None:
        """Read it and check its files; raises `BaseModelError`, also for another `digest`."""
        self.folder = folder
        path = folder / MANIFEST
        try:
            data = path.read_bytes()
            self.digest = sha256_hex(data)
            self.manifest = KitManifest(**json.loads(data))
            found = {name: sha256_hex(self._read(name)) for name in self.manifest.files}
        except (OSError, ValueError, TypeError) as error:
            raise BaseModelError(
                f"{path}: not a client's kit of a base model: {error}; the operator makes one "
                "with: fedtune nano kit"
            ) from error
        if digest is not None and self.digest != digest:
            raise BaseModelError(
                f"{path}: its digest is {self.digest}, machine.kit-digest says {digest}; this is "
                "another kit, or it has changed"
            )
        wrong = [name for name, sha in self.manifest.files.items() if found[name] != sha]
        if wrong:
            raise BaseModelError(f"{folder}: {', '.join(wrong)} changed since the kit was made")

    @property
    def size(self) -> int:
        """Bytes of all of its files."""
        return sum((self.folder / name).stat().st_size for name in [MANIFEST, *self.manifest.files])

    @property
    def connector(self) -> Path:
        """The connector's file."""
        return self.folder / CONNECTOR

    @property
    def emulator(self) -> Path:
        """The emulator's folder, if the kit has one."""
        return self.folder / EMULATOR

    def tokenizer(self) -> Any:
        """The base model's tokenizer; raises `BaseModelError`."""
        return load_tokenizer(self.folder / TOKENIZER)

    def table(self) -> Table:
        """The embeddings; raises `BaseModelError`."""
        try:
            found = load_file(self.folder / EMBEDDINGS)
            return Table(found["tokens"], found["weight"])
        except (OSError, SafetensorError, KeyError) as error:
            raise BaseModelError(f"{self.folder / EMBEDDINGS}: {error}") from error

    def head(self, answers: int) -> Head:
        """The output layer's rows for so many answers; raises `BaseModelError`."""
        path = self.folder / HEAD
        try:
            found = load_file(path)
            weight, scale = torch.from_numpy(found["weight"]), float(found["scale"][0])
        except (OSError, SafetensorError, KeyError, IndexError) as error:
            raise BaseModelError(
                f"{path}: {error}; this federation needs a kit with rows of the output layer: the "
                "operator makes one with its federation.toml"
            ) from error
        if weight.shape[0] != answers:
            raise BaseModelError(
                f"{path}: rows for {len(weight)} answers, data.labels has {answers}; ask the "
                "operator for this federation's kit"
            )
        return Head(weight, scale)

    def _read(self, name: str) -> bytes:
        path = self.folder / name
        # A manifest that comes from elsewhere names no file outside of the kit.
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"{name} is not inside")
        if path.stat().st_size > _LARGEST_FILE:
            raise ValueError(f"{name} is too large")
        return path.read_bytes()


def write_kit(
    folder: Path,
    base: CausalBase,
    connector: Path,
    vocabulary: Iterable[str] | None,
    emulator: Path | None = None,
    head: Head | None = None,
) -> ClientKit:
    """Make the kit in the new folder; with `vocabulary`, only tokens of these texts get a row.

    `emulator` is the folder of what clients train against, if the base model is not served; `head`
    is for those who make scores of states.
    """
    tokenizer = base.tokenizer
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    weight: Tensor = base.module.get_input_embeddings().weight  # type: ignore[operator]
    pad = int(tokenizer.pad_token_id or 0)
    tokens = np.arange(len(weight))
    if vocabulary is not None:
        ids = {token for text in vocabulary for token in tokenizer(text)["input_ids"]}
        tokens = np.array(sorted({*ids, pad}), np.int64)
    rows = weight.detach()[torch.from_numpy(tokens)].float().numpy()
    write_atomic(fresh / EMBEDDINGS, save({"tokens": tokens.astype(np.int64), "weight": rows}))
    if head is not None:
        scale = np.array([head.scale], np.float64)
        write_atomic(fresh / HEAD, save({"weight": head.weight.numpy(), "scale": scale}))
    shutil.copyfile(connector, fresh / CONNECTOR)
    tokenizer.save_pretrained(fresh / TOKENIZER)
    if emulator is not None:
        shutil.copytree(emulator, fresh / EMULATOR)
    names = sorted(str(f.relative_to(fresh)) for f in fresh.rglob("*") if f.is_file())
    files = {name: sha256_hex((fresh / name).read_bytes()) for name in names}
    manifest = KitManifest(base.name, base.digest, base.max_tokens, pad, files)
    write_json(fresh / MANIFEST, asdict(manifest))
    fresh.rename(folder)
    return ClientKit(folder)
