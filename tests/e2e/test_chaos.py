"""A short chaos run; `chaos.py` does longer ones by command."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from chaos import KINDS, Chaos, faults


def test_the_sequence_is_that_of_the_seed() -> None:
    one, again, other = (list(islice(faults(seed), 200)) for seed in (1, 1, 2))
    assert one == again != other
    assert {fault.kind for fault in one} == set(KINDS)


def test_what_must_hold_holds_whatever_happens(
    tmp_path: Path, tiny_base: Path, client_folders: Path
) -> None:
    chaos = Chaos(tmp_path / "runs", tiny_base, client_folders, rounds=6, say=print)
    chaos.run(seed=3, seconds=30.0)
    assert chaos.ends
    assert chaos.struck.total() >= 5
