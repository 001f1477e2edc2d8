"""What `fedtune eval` and `fedtune export` do with the model of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fedtune.config import load_config
from fedtune.data.labelled import load_examples
from fedtune.errors import BaseModelError, ConfigError, RunFolderError
from fedtune.export.merged import CLASSIFIER, export_merged
from fedtune.export.peft_folder import Passport, read_adapter, write_adapter
from fedtune.simulation.folder import ADAPTER, CONFIG
from fedtune.simulation.job import TextModel
from fedtune.train.torch_trainer import TorchSettings, TorchTrainer


def evaluate(path: Path, data: Path, text_column: str, label_column: str, as_json: bool) -> int:
    """Evaluate the adapter of a run on the rows of a file; returns the exit code."""
    passport, model = _load_model(path)
    column = label_column if passport.labels else None
    examples = load_examples(data, passport.labels, text_column, column)
    trainer = TorchTrainer(model.adapter, model.task, model.base.digest, TorchSettings())
    found = trainer.evaluate(model.adapter.read(), model.prepare(examples))
    result: dict[str, Any] = {
        "run": str(path),
        "data": str(data),
        "examples": found.examples,
        "loss": found.loss,
        "accuracy": found.accuracy,
    }
    if found.accuracy is not None:
        measure = f"accuracy {found.accuracy:.1%}"
    else:
        result["perplexity"] = math.exp(found.loss)
        measure = f"perplexity {result['perplexity']:.2f}"
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        print(f"{found.examples:,} rows: {measure}, loss {found.loss:.3f}")
    return 0


def export(path: Path, out: Path, kind: str) -> int:
    """Write the model of a run to the new folder `out`; returns the exit code."""
    if kind not in ("merged", "adapter"):
        raise ConfigError(f"--format {kind}: there is merged and adapter")
    if out.exists():
        raise RunFolderError(f"{out} exists already; choose another --out")
    passport, model = _load_model(path)
    if kind == "merged":
        export_merged(model.adapter, model.base.tokenizer, passport, out)
        found = f"AutoModel.from_pretrained; head in {CLASSIFIER}"
        if not passport.labels:
            found = "AutoModelForCausalLM.from_pretrained"
        print(f"{out}: load it with transformers.{found}")
    else:
        write_adapter(
            out, model.adapter.manifest, model.adapter.read(), model.adapter.peft_config, passport
        )
        print(f"{out}: load it with peft.PeftModel.from_pretrained")
    return 0


def _load_model(path: Path) -> tuple[Passport, TextModel]:
    """The model of a run with its adapter loaded; raises `UsageError`."""
    passport = Passport.read(path / ADAPTER)
    config = load_config(path / CONFIG)
    model = TextModel(config, len(passport.labels))
    if model.base.digest != passport.base_digest:
        raise BaseModelError(
            f"base model {config.base.path} is not the one that {path} was trained on "
            f"(digest {model.base.digest[:12]}, trained on {passport.base_digest[:12]})"
        )
    model.adapter.write(read_adapter(path / ADAPTER, model.adapter.manifest))
    return passport, model
