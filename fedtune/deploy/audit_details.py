"""What the entries of a server and of a site have in common."""

from __future__ import annotations

import importlib.metadata

from fedtune.audit.entry import Value
from fedtune.report.words import shortened
from fedtune.secagg.keys import Roster
from fedtune.simulation.job import Job

# Reasons come from the other side: they are cut, so that nobody makes entries as long as he likes.
_REASON_WIDTH = 200


def agreement(job: Job, roster: Roster) -> dict[str, Value]:
    """What server and sites must agree on, by its SHA-256 (hex), and what it means for privacy."""
    return {
        "version": importlib.metadata.version("fedtune"),
        "config": job.config.digest,
        "base": job.base_digest,
        "manifest": job.adapter.manifest.digest,
        "roster": roster.digest.hex(),
        "masked": job.config.secagg.enabled,
        "privacy-unit": job.config.privacy.unit,
    }


def reason_of(error: object) -> str:
    """Why something was refused or has failed, in one line."""
    return shortened(str(error), _REASON_WIDTH)
