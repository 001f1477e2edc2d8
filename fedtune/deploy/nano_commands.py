"""What `fedtune nano kit` does."""

from __future__ import annotations

from pathlib import Path

from fedtune.base.answering import AnsweringDecoder
from fedtune.base.causal import CausalBase
from fedtune.base.connector import load_connector
from fedtune.base.kit import write_kit
from fedtune.config import load_config
from fedtune.data.question_files import QUESTION
from fedtune.data.readers import read_cells
from fedtune.errors import ConfigError, RunFolderError
from fedtune.train.questions import PROMPT


def kit(federation: Path, out: Path, texts: Path | None) -> int:
    """Write a kit; returns the exit code."""
    config = load_config(federation)
    if config.base.placement != "server":
        raise ConfigError(f'{federation}: a kit is for base.placement = "server"')
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
        cells = [cell for _, (cell,) in read_cells(texts, [QUESTION])]
        vocabulary = [PROMPT.format(question=str(cell or "")) for cell in [*cells, ""]]
    base = CausalBase(config.base.path, config.base.digest)
    head = AnsweringDecoder(base, config.data.labels).head if config.rungs else None
    made = write_kit(out, base, connector, vocabulary, head)
    print(
        f"{out}: {made.size / 1e6:.1f} MB, embeddings of {len(made.table().tokens):,} tokens; for "
        f'each client.toml:\n\n[machine]\nkit = "{out.name}"\nkit-digest = "{made.digest}"'
    )
    return 0
