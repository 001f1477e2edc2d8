"""What `fedtune eval` and `fedtune export` do with the model of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fedtune.config import Config, load_config
from fedtune.data.labelled import load_examples
from fedtune.errors import BaseModelError, ConfigError, RunFolderError
from fedtune.export.merged import CLASSIFIER, export_merged
from fedtune.export.peft_folder import Passport, read_adapter, write_adapter
from fedtune.simulation.folder import ADAPTER, CONFIG, CONNECTOR
from fedtune.simulation.job import TextModel
from fedtune.train.torch_trainer import TorchSettings, TorchTrainer
from fedtune.train.trainer import Evaluation


def evaluate(path: Path, data: Path, text_column: str, label_column: str, as_json: bool) -> int:
    """Evaluate the adapter of a run on the rows of a file; returns the exit code."""
    passport, config = Passport.read(path / ADAPTER), load_config(path / CONFIG)
    if config.base.task == "visual-question-answering":
        found = _evaluate_questions(path, passport, config, data)
    else:
        text = _load_model(path, passport, config)
        column = label_column if passport.labels else None
        examples = load_examples(data, passport.labels, text_column, column)
        trainer = TorchTrainer(text.adapter, text.task, text.base.digest, TorchSettings())
        found = trainer.evaluate(text.adapter.read(), text.prepare(examples))
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
    passport, config = Passport.read(path / ADAPTER), load_config(path / CONFIG)
    if config.adapter.kind != "lora":
        raise ConfigError(
            f"{path}: this adapter is beside the base model, and is neither merged nor peft's; "
            f"{path / ADAPTER} has its weights and the connector"
        )
    model = _load_model(path, passport, config)
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


def _load_model(path: Path, passport: Passport, config: Config) -> TextModel:
    """The model of a run with its adapter loaded; raises `UsageError`."""
    model = TextModel(config, len(passport.labels))
    _check_base(path, passport, config, model.base.digest)
    model.adapter.write(read_adapter(path / ADAPTER, model.adapter.manifest))
    return model


def _evaluate_questions(path: Path, passport: Passport, config: Config, data: Path) -> Evaluation:
    from fedtune.data.question_files import read_questions
    from fedtune.simulation.vision import VisionModel

    own = config.base.model_copy(update={"connector": str(path / ADAPTER / CONNECTOR)})
    model = VisionModel(config.model_copy(update={"base": own}), passport.labels)
    _check_base(path, passport, config, model.digest)
    adapter = read_adapter(path / ADAPTER, model.adapter.manifest)
    trainer = TorchTrainer(model.adapter, model.task, model.digest, TorchSettings())
    return trainer.evaluate(adapter, model.prepare(read_questions(data, passport.labels)))


def _check_base(path: Path, passport: Passport, config: Config, digest: str) -> None:
    if digest != passport.base_digest:
        raise BaseModelError(
            f"base model {config.base.path} is not the one that {path} was trained on "
            f"(digest {digest[:12]}, trained on {passport.base_digest[:12]})"
        )
