"""What `fedtune eval` and `fedtune export` do with the model of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fedtune.adapter.lora import AttachedAdapter
from fedtune.config import Config, load_config
from fedtune.data.labelled import load_examples
from fedtune.errors import BaseModelError, ConfigError, RunFolderError
from fedtune.export.merged import CLASSIFIER, export_merged
from fedtune.export.peft_folder import Passport, read_adapter, write_adapter
from fedtune.round.site import SiteStore
from fedtune.simulation.folder import ADAPTER, CONFIG, CONNECTOR, SITES, RunFolder
from fedtune.simulation.job import TextModel, parts_for
from fedtune.train.torch_trainer import TorchSettings, TorchTrainer
from fedtune.train.trainer import Evaluation
from fedtune.types import Float32Vector


def evaluate(
    path: Path,
    data: Path,
    text_column: str,
    label_column: str,
    as_json: bool,
    client: str | None = None,
) -> int:
    """Evaluate the adapter of a run on the rows of a file; returns the exit code.

    With the private part of `client`, or with the one that all clients began with.
    """
    passport, config = Passport.read(path / ADAPTER), load_config(path / CONFIG)
    if config.base.task == "visual-question-answering":
        found = _evaluate_questions(path, passport, config, data, client)
    else:
        text = _load_model(path, passport, config, client)
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


def export(path: Path, out: Path, kind: str, client: str | None = None) -> int:
    """Write the model of a run to the new folder `out`; returns the exit code.

    Where a part of the adapter is private, the model is that of `client`.
    """
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
    if config.adapter.private and client is None:
        raise ConfigError(
            f"{path}: part of its adapter is private, and every client has another model; name one "
            f"with --client. What they share is in {path / ADAPTER}"
        )
    model = _load_model(path, passport, config, client)
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


def _load_model(path: Path, passport: Passport, config: Config, client: str | None) -> TextModel:
    """The model of a run with its adapter loaded; raises `UsageError`."""
    model = TextModel(config, len(passport.labels))
    _check_base(path, passport, config, model.base.digest)
    model.adapter.write(_adapter(path, passport, config, model.adapter, client))
    return model


def _adapter(
    path: Path, passport: Passport, config: Config, attached: AttachedAdapter, client: str | None
) -> Float32Vector:
    """The whole adapter, float32 `[attached.manifest.size]`, of a model fresh from its seed."""
    parts = parts_for(config, attached)
    if parts is None:
        if client is not None:
            raise ConfigError(
                f"--client {client}: all of this run's adapter is shared; leave it out"
            )
        return read_adapter(path / ADAPTER, attached.manifest)
    shared = read_adapter(path / ADAPTER, parts.shared)
    if client is None:
        return parts.join(shared, parts.private_of(parts.start))
    return parts.join(shared, _private_part(path, passport.rounds, client))


def _private_part(path: Path, rounds: int, client: str) -> Float32Vector:
    if not (path / SITES).is_file():
        raise RunFolderError(f"{path}: the private parts are at the sites, and none is here")
    with RunFolder.open(path) as run:
        run_id = run.journal.identity()["run_id"]
    store = SiteStore(path / SITES, synchronous="NORMAL")
    try:
        found = store.private_part(client, run_id, rounds + 1)
    finally:
        store.close()
    if found is None:
        raise ConfigError(f"--client {client}: no client of this name has trained in {path}")
    return found


def _evaluate_questions(
    path: Path, passport: Passport, config: Config, data: Path, client: str | None
) -> Evaluation:
    from fedtune.data.question_files import read_questions
    from fedtune.simulation.vision import VisionModel

    own = {"connector": str(path / ADAPTER / CONNECTOR)}
    if passport.emulator is not None:
        own["placement"] = "client"  # it is plugged in; what it was trained against is not needed
    base = config.base.model_copy(update=own)
    model = VisionModel(config.model_copy(update={"base": base}), passport.labels)
    digest = model.client.digest(model.base.digest, passport.labels, passport.emulator)
    _check_base(path, passport, config, digest)
    adapter = _adapter(path, passport, config, model.adapter, client)
    trainer = TorchTrainer(model.adapter, model.task, digest, TorchSettings())
    return trainer.evaluate(adapter, model.prepare(read_questions(data, passport.labels)))


def _check_base(path: Path, passport: Passport, config: Config, digest: str) -> None:
    if digest != passport.base_digest:
        raise BaseModelError(
            f"base model {config.base.path} is not the one that {path} was trained on "
            f"(digest {digest[:12]}, trained on {passport.base_digest[:12]})"
        )
