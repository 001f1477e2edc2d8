"""Rehearsed failures: clients that leave a round at a chosen stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STAGES = ("advertise", "share", "train", "sign", "reveal")


@dataclass(frozen=True)
class Dropout:
    """In every round a share of the cohort, drawn anew, is gone from `stage` on."""

    fraction: float
    stage: str
    seed: int

    def absent(self, round_number: int, stage: str, cohort: Sequence[str]) -> list[str]:
        """Who of the cohort does not answer at `stage` of a round."""
        if STAGES.index(stage) < STAGES.index(self.stage):
            return []
        # The trailing constant keeps this stream apart from that of the cohort.
        rng = np.random.default_rng([self.seed, round_number, 0, 2])
        gone = round(self.fraction * len(cohort))
        return [sorted(cohort)[i] for i in rng.choice(len(cohort), gone, replace=False)]
