"""What `fedtune server` and `fedtune client` print."""

from __future__ import annotations

import datetime
import importlib.util
import json
import logging
import os
import signal
import sys
from pathlib import Path

from rich.console import Console

from fedtune.errors import UsageError


def server(federation: Path, as_json: bool) -> int:
    """Run the server; returns the exit code."""
    _require("torch", "transformers", "peft", "jinja2", "matplotlib", "prometheus_client")
    from fedtune.deploy.server import Terminated, run_server
    from fedtune.report.progress import make_progress
    from fedtune.report.tables import print_ending

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    progress = make_progress()
    try:
        outcome = run_server(federation, progress)
    except KeyboardInterrupt as stop:
        progress.finished()
        print(f"fedtune: stopped; go on with: fedtune server {federation}", file=sys.stderr)
        return _end_by_sigterm() if isinstance(stop, Terminated) else 130
    if as_json:
        value = {"run": str(outcome.path), **outcome.summary.to_json()}
        print(json.dumps(value, ensure_ascii=False))
    else:
        print_ending(outcome.summary, Console(), outcome.path)
    if outcome.error:
        print(
            f"fedtune: the run failed: {outcome.error}; go on with: fedtune server {federation}",
            file=sys.stderr,
        )
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


def _end_by_sigterm() -> int:
    """End as if nothing had caught the signal.

    To a service manager that is a clean end, and to a shell (143) not a finished run.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
    return 128 + signal.SIGTERM  # the first process of a container does not die by it


def _require(*packages: str) -> None:
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UsageError(f"not installed: {', '.join(missing)}; pip install 'fedtune[simulate]'")
