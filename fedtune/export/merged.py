"""The adapter merged into its base: a folder that needs neither peft nor fedtune."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from fedtune.adapter.lora import AttachedAdapter
from fedtune.base.classifier import EncoderClassifier
from fedtune.errors import RunFolderError
from fedtune.export.peft_folder import Passport, replace_folder
from fedtune.files import write_atomic

CLASSIFIER = "classifier.safetensors"


def export_merged(
    attached: AttachedAdapter, tokenizer: Any, passport: Passport, folder: Path
) -> None:
    """Write the merged model to `folder`, which must not exist.

    `AutoModelForCausalLM.from_pretrained(folder)` gives a causal language model. Of a classifier,
    `AutoModel.from_pretrained(folder)` gives the encoder; `classifier.safetensors` holds the
    linear layer's `weight` `[labels, hidden]` and `bias` `[labels]`, and the labels' names are
    in `config.json` (`id2label`). `attached` is used up: its matrices are folded into the base.
    """
    if folder.exists():
        raise RunFolderError(f"{folder} exists already; give another --out")
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    merged: Any = attached.module.merge_and_unload()  # type: ignore[operator]  # peft's method
    tokenizer.save_pretrained(fresh)
    if isinstance(merged, EncoderClassifier):
        _write_classifier(merged, passport, fresh)
    else:
        merged.save_pretrained(fresh)
    replace_folder(fresh, folder)


def _write_classifier(merged: EncoderClassifier, passport: Passport, folder: Path) -> None:
    from safetensors.torch import save

    encoder, head = merged.encoder, merged.classifier
    names = dict(enumerate(passport.labels))
    encoder.config.id2label = names  # type: ignore[union-attr]  # a transformers model
    encoder.config.label2id = {label: i for i, label in names.items()}  # type: ignore[union-attr]
    encoder.save_pretrained(folder)  # type: ignore[operator]  # a transformers model
    state = {name: tensor.contiguous() for name, tensor in head.state_dict().items()}
    write_atomic(folder / CLASSIFIER, save(state, metadata={"pooling": passport.pooling}))
    write_atomic(folder / "fedtune.json", json.dumps({"pooling": passport.pooling}).encode())
