"""An adapter as a folder that peft loads, with a passport that says where it comes from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fedtune.errors import RunFolderError
from fedtune.files import write_atomic, write_json
from fedtune.types import Float32Vector, Manifest

WEIGHTS = "adapter_model.safetensors"
PASSPORT = "passport.json"


@dataclass(frozen=True)
class Passport:
    """Where an adapter comes from and what it fits; `passport.json` beside the weights."""

    base: str
    base_digest: str
    manifest_digest: str
    config_digest: str
    adapter_digest: str  # SHA-256 of the float32 vector in manifest order
    labels: tuple[str, ...]
    pooling: str
    max_length: int
    rounds: int
    clients: int
    rule: str
    method: str  # `train.method`; the directions of forward-only training come from the seed
    directions: int | None
    seed: int
    epsilon: float | None
    epsilon_unit: str
    fedtune_version: str
    emulator: str | None = None  # digest of what it was trained against instead of the base

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The passport in an adapter folder; raises `RunFolderError`."""
        path = folder / PASSPORT
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**value, "labels": tuple(value["labels"])})
        except FileNotFoundError as error:
            raise RunFolderError(f"{folder}: no {PASSPORT}, so not a finished run") from error
        except (ValueError, TypeError, KeyError) as error:
            raise RunFolderError(f"{path}: not a passport of this fedtune: {error}") from error


def write_adapter(
    folder: Path,
    manifest: Manifest,
    adapter: Float32Vector,
    peft_config: Any,
    passport: Passport,
    beside: Mapping[str, Path] = MappingProxyType({}),
) -> None:
    """Replace `folder` by the adapter (float32 `[manifest.size]`), so that peft loads it.

    `peft_config` is None for an adapter that peft does not know, such as NanoAdapters: then there
    are the weights and the passport. Files `beside` are copied into the folder under their names.
    """
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    if peft_config is not None:
        peft_config.base_model_name_or_path = passport.base
        peft_config.inference_mode = True
        if peft_config.target_modules is not None:
            # peft keeps a set, whose order differs from process to process.
            peft_config.target_modules = sorted(peft_config.target_modules)
        peft_config.save_pretrained(fresh)
    write_atomic(fresh / WEIGHTS, save(manifest.split(adapter), metadata={"format": "pt"}))
    write_json(fresh / PASSPORT, asdict(passport))
    for name, file in beside.items():
        write_atomic(fresh / name, file.read_bytes())
    replace_folder(fresh, folder)


def read_adapter(folder: Path, manifest: Manifest) -> Float32Vector:
    """The adapter of a PEFT folder as a vector; raises `RunFolderError` if it does not fit."""
    path = folder / WEIGHTS
    try:
        return manifest.join(load_file(path))
    except (OSError, ValueError, SafetensorError) as error:
        raise RunFolderError(f"{path}: not an adapter for this base model: {error}") from error


def replace_folder(fresh: Path, folder: Path) -> None:
    """Put `fresh` in the place of `folder`, which is there whole before and after."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
