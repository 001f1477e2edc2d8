"""Where this user's machine keeps what can be computed again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """`fedtune` in `$XDG_CACHE_HOME` or `~/.cache`; None where there is no such place."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(given) if given else Path.home() / ".cache") / "fedtune"
    except RuntimeError:  # a container's user may have no home
        return None
