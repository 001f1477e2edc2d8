"""A site or a server of questions about images: its rows, its kit, and where the base model is."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from fedtune.config import Config
from fedtune.data.question_files import read_questions
from fedtune.data.questions import QuestionExamples
from fedtune.deploy.doctor.edge import TRAINING
from fedtune.deploy.doctor.findings import FIRST, Examination, Verdict
from fedtune.deploy.doctor.machine import Needs
from fedtune.deploy.doctor.network import Address
from fedtune.deploy.doctor.pytorch import absent
from fedtune.deploy.doctor.rounds import examine_policy, examine_traffic
from fedtune.deploy.keys import Members
from fedtune.deploy.site_files import SiteFiles
from fedtune.deploy.site_training import IN_FRONT_OF_A_CUT
from fedtune.errors import BaseModelError, ConfigError, DataError
from fedtune.report import words

WITHOUT_TORCH = (*TRAINING, *IN_FRONT_OF_A_CUT)
_SECONDS = 5.0


def examine_vision(
    examination: Examination, files: SiteFiles, data: Sequence[Path], members: Members | None
) -> tuple[Needs, bool]:
    """What a site with questions about images needs, and whether it is possible."""
    config = files.federation
    examination.begin("base model")
    found = None
    if files.config.machine.runtime != "torch":
        found = _examine_artifacts(examination, files)
    elif lacking := absent():
        examination.skip("kit", f"not installed: {', '.join(lacking)}", FIRST)
    elif files.has_kit:
        found = examination.run("kit", lambda: _kit(files))
    else:
        advice = "fedtune doctor --measure loads it"
        examination.skip("model", "not looked at, behind an image encoder", advice)
    if files.splits:
        examination.run("its server", lambda: _server(files.base_server))
    if found is not None and members is not None:
        examine_policy(examination, files, members, found[1])
    examination.begin("data")
    rows = [examination.run("questions", partial(look_at_questions, file, config)) for file in data]
    disk = examine_traffic(examination, files, found[0], members) if found else None
    return Needs(disk, None), all(row is not None for row in rows) and found is not None


def look_at_questions(path: Path, config: Config) -> Verdict[QuestionExamples]:
    """The rows of a file, and how many have an image, if all of them can be used."""
    try:
        found = read_questions(path, config.data.labels)
    except DataError as error:
        what = str(error).partition("; ")[0]
        return Verdict("problem", what, "the file needs columns question, answer and image")
    pictured = int((found.images >= 0).sum())
    counts = np.bincount(found.labels, minlength=len(config.data.labels)).tolist()
    numbers = {"rows": len(found), "images": len(found.files)}
    numbers |= dict(zip(config.data.labels, counts, strict=True))
    text = f"{words.plural(len(found), 'question')}, {pictured:,} of them about an image"
    return Verdict("ok", text, numbers=numbers, value=found)


def look_at_emulator(path: Path, config: Config) -> Verdict[None]:
    """What sites train against, and the server tests in too, as the operator has made it."""
    from fedtune.base.emulator import read_manifest

    try:
        manifest, digest = read_manifest(path, config.emulator.digest)
    except BaseModelError as error:
        return Verdict("problem", str(error), "see docs/nano.md")
    kept = f"{len(manifest.plan.kept)} of {manifest.plan.layers} layers"
    text = f"{path}, digest {digest}, {kept}"
    if config.emulator.digest is None:
        advice = "set emulator.digest in federation.toml, before the kit is made"
        return Verdict("warning", text, advice)
    return Verdict("ok", text)


def _kit(files: SiteFiles) -> Verdict[tuple[int, str]]:
    """Size of the adapter, and the digest of all that is frozen."""
    from fedtune.base.answering import first_tokens
    from fedtune.base.connector import load_connector
    from fedtune.base.vision import VisionEncoder
    from fedtune.deploy.vision_site import kit_emulator, read_kit
    from fedtune.simulation.vision import attach_adapter, frozen_digest
    from fedtune.types import sha256_hex

    config, machine = files.federation, files.config.machine
    try:
        kit = read_kit(files)
        tokens = first_tokens(kit.tokenizer(), config.data.labels)
        encoder = VisionEncoder(config.base.encoder).digest
        emulator = None if files.splits else kit_emulator(kit, config)
        head = kit.head(len(tokens)) if config.rungs else None
        connector, _ = load_connector(kit.connector)
        size = attach_adapter(config, connector, kit.table(), head).manifest.size
    except (BaseModelError, ConfigError, DataError) as error:
        return Verdict("problem", str(error), "see docs/nano.md")
    emulated = emulator.digest if emulator else None
    sha = sha256_hex(kit.connector.read_bytes())
    digest = frozen_digest(kit.manifest.base_digest, encoder, sha, tokens, emulated)
    text = f"{kit.folder}, digest {kit.digest}, {words.size(kit.size)}; an adapter of {size:,}"
    if emulator is not None:
        text += f"; trained against {emulator.words}"
    if machine.kit_digest is None:
        advice = "set machine.kit-digest, told to you on another way than the files came"
        return Verdict("warning", text, advice, {"adapter_parameters": size}, (size, digest))
    return Verdict("ok", text, numbers={"adapter_parameters": size}, value=(size, digest))


def _examine_artifacts(examination: Examination, files: SiteFiles) -> tuple[int, str] | None:
    if lacking := [name for name in WITHOUT_TORCH if importlib.util.find_spec(name) is None]:
        examination.skip("artifacts", f"not installed: {', '.join(lacking)}", FIRST)
        return None
    return examination.run("artifacts", lambda: _artifacts(files))


def _artifacts(files: SiteFiles) -> Verdict[tuple[int, str]]:
    """Size of the adapter, and the digest of all that is frozen, of a site without PyTorch."""
    from fedtune.deploy.edge_vision_site import open_nano_artifacts

    artifacts = open_nano_artifacts(files)
    for name in artifacts.manifest.files:
        artifacts.path(name)
    size = artifacts.tensors.size
    found = size, artifacts.cut.digest(artifacts.manifest.base_digest)
    text = f"{artifacts.folder}, digest {artifacts.digest}; an adapter of {size:,}"
    if files.config.machine.artifacts_digest is None:
        advice = "set machine.artifacts-digest, told to you on another way than the files came"
        return Verdict("warning", text, advice, {"adapter_parameters": size}, found)
    return Verdict("ok", text, numbers={"adapter_parameters": size}, value=found)


def _server(where: str) -> Verdict[None]:
    try:
        address = Address.parse(where)
        with socket.create_connection((address.host, address.port), _SECONDS):
            return Verdict("ok", f"something listens at {where}")
    except (OSError, ConfigError) as error:
        advice = "start fedtune server, open its base-port, or correct site.base-server"
        return Verdict("problem", f"{where}: {error}", advice)
