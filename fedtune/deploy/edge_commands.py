"""What `fedtune edge` prints."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fedtune.edge.artifacts import EdgeArtifacts
from fedtune.edge.checks import Check
from fedtune.edge.verify import verify
from fedtune.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from fedtune.config import Config


def build(federation: Path, out: Path, overrides: Sequence[str], kit: Path | None = None) -> int:
    """Build artifacts; returns the exit code."""
    needed = ("torch", "transformers", "peft", "onnx", "onnxscript", "onnxruntime")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UsageError(f"not installed: {', '.join(missing)}; pip install 'fedtune[edge-build]'")
    from fedtune.config import load_config

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    config = load_config(federation, overrides)
    if config.lacks_labels:
        raise ConfigError(f"{federation}: data.labels is missing; the graphs have one output each")
    splits = config.base.placement == "server"
    if splits != (kit is not None):
        raise ConfigError(
            f'{federation}: with base.placement = "{config.base.placement}" artifacts are made '
            + (
                "from a client's kit; make one with fedtune nano kit, and name it with --kit"
                if splits
                else "from the base model; leave out --kit"
            )
        )
    if kit is None:
        _build(config, out)
    else:
        from fedtune.base.kit import ClientKit
        from fedtune.edge.build.nano import build_nano

        build_nano(config, ClientKit(kit), out, _say)
    found = EdgeArtifacts(out)
    size = sum(entry.size for entry in found.manifest.files.values())
    runtime = '"ort"  # or "stepgraph"' if kit is None else '"stepgraph"'
    print(
        f"{out}: {size / 1e6:.0f} MB in {len(found.manifest.files)} files; for client.toml:\n\n"
        f'[machine]\nruntime = {runtime}\nartifacts = "{out.name}"\n'
        f'artifacts-digest = "{found.digest}"'
    )
    return 0


def _build(config: Config, out: Path) -> None:
    from fedtune.edge.build import artifacts
    from fedtune.edge.build.model import EdgeModel
    from fedtune.simulation.job import TextModel

    if config.base.task == "visual-question-answering":
        raise ConfigError(
            'artifacts of NanoAdapters are for base.placement = "server": a device has no base '
            "model behind an image encoder"
        )
    model = TextModel(config, len(config.data.labels))
    parts = EdgeModel(model.base, model.adapter, model.pad_id, model.max_length)
    artifacts.build(config, parts, out, _say)


def check(folder: Path, digest: str | None, as_json: bool) -> int:
    """Compare this machine with the reference in the artifacts; returns the exit code."""
    artifacts = EdgeArtifacts(folder, digest)
    checks: list[Check] = []
    for found in verify(artifacts):
        checks.append(found)
        if sys.stderr.isatty():
            print(f"\r\033[K{found.what}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    passed = all(check.passed for check in checks)
    if as_json:
        rows = [asdict(check) | {"passed": check.passed} for check in checks]
        print(json.dumps({"passed": passed, "digest": artifacts.digest, "checks": rows}))
    else:
        Console().print(_table(checks))
        print(
            f"digest {artifacts.digest}: {'all is' if passed else 'NOT all is'} as PyTorch has it"
        )
    return 0 if passed else 1


def _table(checks: Sequence[Check]) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column("compared")
    table.add_column("off by", justify="right")
    table.add_column("limit", justify="right")
    table.add_column("")
    for check in checks:
        mark = "[green]ok[/]" if check.passed else "[red]too far[/]"
        table.add_row(check.what, f"{check.found:.1e}", f"{check.limit:.0e}", mark)
    return table


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
