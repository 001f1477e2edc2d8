"""A message belongs to one run, round, base model, manifest and configuration."""

from __future__ import annotations

from dataclasses import replace

from fedtune.errors import ContextMismatch, LateMessage
from fedtune.types import RoundContext


def check_context(actual: RoundContext, expected: RoundContext) -> None:
    """Raise `ContextMismatch`, naming the first field that differs."""
    if actual == expected:
        return
    if actual.round < expected.round and replace(actual, round=expected.round) == expected:
        raise LateMessage(f"a message of round {actual.round} in round {expected.round}")
    for name, words in _FIELDS.items():
        theirs, ours = getattr(actual, name), getattr(expected, name)
        if replace(expected, **{name: theirs}) != expected:
            raise ContextMismatch(
                f"the other side has another {words}: {str(theirs)[:12]}, here {str(ours)[:12]}"
            )


_FIELDS = {
    "run_id": "run",
    "round": "round",
    "base_digest": "base model",
    "manifest_digest": "adapter manifest",
    "config_digest": "configuration",
}
