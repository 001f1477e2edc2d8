"""What `fedtune nano kit` and `fedtune nano emulator` do."""

from __future__ import annotations

from pathlib import Path

from fedtune.base.answering import AnsweringDecoder, first_tokens
from fedtune.base.causal import CausalBase
from fedtune.base.connector import load_connector
from fedtune.base.emulator import Emulator
from fedtune.base.kit import write_kit
from fedtune.config import load_config
from fedtune.data.question_files import read_asked
from fedtune.errors import ConfigError, RunFolderError
from fedtune.simulation.emulation import find_emulator, make_emulator
from fedtune.train.question_rows import PROMPT


def kit(federation: Path, out: Path, texts: Path | None) -> int:
    """Write a kit; returns the exit code."""
    config = load_config(federation)
    if config.base.placement == "client":
        raise ConfigError(f'{federation}: a kit is for base.placement = "server" or "emulator"')
    if config.base.connector is None:
        raise ConfigError(
            f"{federation}: base.connector is missing; make one with: fedtune nano "
            "pretrain-connector"
        )
    if out.exists():
        raise RunFolderError(f"{out} exists already; choose another --out")
    connector = federation.parent / Path(config.base.connector).expanduser()
    load_connector(connector, config.base.connector_digest)
    vocabulary = None
    if texts is not None:
        vocabulary = [PROMPT.format(question=question) for question in [*read_asked(texts), ""]]
    base = CausalBase(config.base.path, config.base.digest)
    emulator = None
    if config.base.placement == "emulator":
        if config.emulator.path is not None:  # relative to the file that names it
            path = federation.parent / Path(config.emulator.path).expanduser()
            config = load_config(federation, values={"emulator.path": str(path)})
        emulator = find_emulator(config, base, config.data.labels, ()).folder
    head = AnsweringDecoder(base, config.data.labels).head if config.rungs else None
    made = write_kit(out, base, connector, vocabulary, emulator, head)
    print(
        f"{out}: {made.size / 1e6:.1f} MB, embeddings of {len(made.table().tokens):,} tokens; for "
        f'each client.toml:\n\n[machine]\nkit = "{out.name}"\nkit-digest = "{made.digest}"'
    )
    return 0


def emulator(federation: Path, out: Path, texts: Path) -> int:
    """Make an emulator of public questions; returns the exit code."""
    config = load_config(federation)
    if config.base.placement != "emulator":
        raise ConfigError(f'{federation}: an emulator is for base.placement = "emulator"')
    if config.lacks_labels:
        raise ConfigError(f"{federation}: data.labels is missing; an emulator has their rows alone")
    if out.exists():
        raise RunFolderError(f"{out} exists already; choose another --out")
    base = CausalBase(config.base.path, config.base.digest)
    plan, digest = make_emulator(config, base, config.data.labels, read_asked(texts), out)
    made = Emulator(out, first_tokens(base.tokenizer, config.data.labels), digest)
    print(
        f"{out}: {made.words}; {made.size / 1e6:.1f} MB\n"
        f"layers by place: {', '.join(map(str, plan.standing))}\n"
        f"CKA of a layer's states with those of the one that is kept for it: {plan.similarity:.3f} "
        f"on average\nfor federation.toml:\n\n"
        f'[emulator]\npath = "{out.name}"\ndigest = "{digest}"'
    )
    return 0
