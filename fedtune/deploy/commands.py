"""What `fedtune server` and `fedtune client` print."""

from __future__ import annotations

import datetime
import importlib.util
import json
import logging
import sys
from pathlib import Path

from rich.console import Console

from fedtune.errors import UsageError


def server(federation: Path, as_json: bool) -> int:
    """Run the server; returns the exit code."""
    _require("torch", "transformers", "peft", "jinja2", "matplotlib")
    from fedtune.deploy.server import run_server
    from fedtune.report.progress import make_progress
    from fedtune.report.tables import print_summary

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    progress = make_progress()
    try:
        outcome = run_server(federation, progress)
    except KeyboardInterrupt:
        progress.finished()
        print(f"\nfedtune: stopped; go on with: fedtune server {federation}", file=sys.stderr)
        return 130
    if as_json:
        value = {"run": str(outcome.path), **outcome.summary.to_json()}
        print(json.dumps(value, ensure_ascii=False))
    else:
        print_summary(outcome.summary, Console(), outcome.path)
    if outcome.error:
        print(f"fedtune: the run failed: {outcome.error}", file=sys.stderr)
        return 1
    return 0


def client(file: Path, once: bool) -> int:
    """Run a site; returns the exit code."""
    from fedtune.deploy.client import run_client

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    return run_client(file, once, _say)


def _say(text: str) -> None:
    time = datetime.datetime.now().astimezone().strftime("%H:%M:%S")
    # Some of it comes from the server, and must not command this terminal.
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    print(f"{time} {line}", file=sys.stderr, flush=True)


def _require(*packages: str) -> None:
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UsageError(f"not installed: {', '.join(missing)}; pip install 'fedtune[simulate]'")
