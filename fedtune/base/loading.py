"""What loading an encoder and loading a decoder have in common."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from pathlib import Path
from typing import Any

# Tokenizing is quick and its threads do not survive the fork that shares the base model.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import nn

from fedtune.base.resolve import digest_base, gguf_file, resolve_base
from fedtune.errors import BaseModelError


def open_base(name: str, expected: str | None) -> tuple[Path, str]:
    """Folder and digest of base model `name`, the digest being `expected` if that is given.

    Raises `BaseModelError`.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder = resolve_base(name)
    digest = digest_base(folder)
    if expected is not None and digest != expected:
        raise BaseModelError(
            f"base model {folder}: its digest is {digest}, base.digest says "
            f"{expected}; this is another model, or a file of it has changed"
        )
    return folder, digest


def load_frozen(auto: Any, folder: Path, **arguments: Any) -> nn.Module:
    """The pretrained module of one of transformers' `Auto` classes, in float32 and frozen.

    Raises `BaseModelError`, also if a weight is not in the file.
    """
    source: dict[str, Any] = _source(folder)
    if source:
        from transformers import GgufConfig

        # By default transformers keeps the weights packed where it can, on some machines.
        source["quantization_config"] = GgufConfig(dequantize=True)
    else:
        source["use_safetensors"] = True
    module: nn.Module
    try:
        # Of a GGUF file's conversion a progress bar would be drawn.
        with contextlib.redirect_stderr(io.StringIO()):
            module, found = auto.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
                **source,
                **arguments,
            )
    except Exception as error:  # transformers raises its own kinds for broken configurations
        raise BaseModelError(
            f"base model {folder}: cannot be loaded: {first_line(error)}"
        ) from error
    if missing := sorted(found["missing_keys"]):
        # They would be drawn at random, differently in each process, and called pretrained.
        raise BaseModelError(
            f"base model {folder}: {len(missing)} weights are missing in the file, "
            f"such as {missing[0]}"
        )
    return module.requires_grad_(False)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a base model; raises `BaseModelError`."""
    from transformers import AutoTokenizer

    source = _source(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, **source)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(
            f"base model {folder}: its tokenizer cannot be loaded: {first_line(error)}"
        ) from error


def load_config(folder: Path) -> Any:
    """The transformers configuration of a base model; raises what transformers raises."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True, **_source(folder))


def _source(folder: Path) -> dict[str, str]:
    """How transformers is told of a GGUF file; raises `BaseModelError` if it could not read it."""
    name = gguf_file(folder)
    if name is None:
        return {}
    if importlib.util.find_spec("gguf") is None:
        raise BaseModelError(
            f"base model {folder / name}: a GGUF file needs gguf; pip install 'fedtune[decoder]'"
        )
    return {"gguf_file": name}


def transformers_config(module: nn.Module) -> Any:
    """The configuration of one of transformers' modules."""
    return module.config


def longest_text(config: Any) -> int:
    """Tokens of the longest text that a model of this configuration has positions for."""
    positions = getattr(config, "max_position_embeddings", None)
    # RoBERTa and its kin start counting positions after the padding id.
    offset = 2 if "roberta" in config.model_type else 0
    return int(positions) - offset if positions else 1 << 20


def first_line(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
