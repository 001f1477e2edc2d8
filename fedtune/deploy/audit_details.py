"""What the entries of a server and of a site have in common."""

from __future__ import annotations

import importlib.metadata

from fedtune.audit.entry import Value
from fedtune.config import Config
from fedtune.report.words import shortened
from fedtune.secagg.keys import Roster
from fedtune.types import Manifest

# Reasons come from the other side: they are cut, so that nobody makes entries as long as he likes.
_REASON_WIDTH = 200


def agreement(
    config: Config, base_digest: str, manifest: Manifest, roster: Roster
) -> dict[str, Value]:
    """What server and sites must agree on, by its SHA-256 (hex), and what it means for privacy."""
    return {
        "version": importlib.metadata.version("fedtune"),
        "config": config.digest,
        "base": base_digest,
        "manifest": manifest.digest,
        "roster": roster.digest.hex(),
        "masked": config.secagg.enabled,
        "privacy-unit": config.privacy.unit,
    }


def reason_of(error: object) -> str:
    """Why something was refused or has failed, in one line."""
    return shortened(str(error), _REASON_WIDTH)
