"""A site that trains with PyTorch: its base model, its rows, and what they need of the machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.config import Config
from fedtune.deploy.doctor.data import examine_base, examine_lengths, examine_rows
from fedtune.deploy.doctor.findings import FIRST, Examination, Verdict
from fedtune.deploy.doctor.machine import Needs
from fedtune.deploy.doctor.rounds import examine_policy, examine_traffic
from fedtune.deploy.keys import Members
from fedtune.deploy.site_files import SiteFiles
from fedtune.errors import BaseModelError

if TYPE_CHECKING:  # it imports torch
    from fedtune.deploy.doctor.predict import ModelShape

TRAINING = ("torch", "transformers", "peft")


def examine_pytorch(
    examination: Examination,
    files: SiteFiles,
    data: Sequence[Path],
    members: Members | None,
) -> tuple[Needs, bool]:
    """What training with PyTorch needs, and whether it is possible."""
    config = files.federation
    if is_fetched(files):
        examination.begin("base model")
        advice = "fedtune client fetches it from the server when it starts; or set machine.base"
        examination.add("base model", Verdict("warning", "it is not on this machine", advice))
        base = None
    else:
        base = examine_base(examination, config, files.config.policy.base_digests)
    if base is not None and members is not None:
        examine_policy(examination, files, members, base[1])
    shape = _shape(examination, config, base[0] if base else None)
    rows = examine_rows(examination, config, files.config.site.name, *data)
    needs = Needs()
    if base is None or shape is None:
        examination.skip("length of texts", "the base model is not known", FIRST)
    else:
        tokens = shape.longest
        if rows is not None:
            tokens = examine_lengths(examination, base[0], rows, shape.longest) or tokens
        disk = examine_traffic(examination, files, shape.shared, members)
        needs = Needs(disk, _memory(config, shape, tokens))
    return needs, rows is not None and shape is not None


def absent() -> list[str]:
    """What it takes to look at a model, and is not installed."""
    return [name for name in TRAINING if importlib.util.find_spec(name) is None]


def is_fetched(files: SiteFiles) -> bool:
    """Whether the base model is going to come from the server."""
    try:
        return files.federation.base.digest is not None and not files.has_base()
    except BaseModelError:
        return False  # machine.base names one that is not there


def _shape(examination: Examination, config: Config, base: Path | None) -> ModelShape | None:
    if base is None or (lacking := absent()):
        why = f"not installed: {', '.join(lacking)}" if base else "there is no base model"
        examination.skip("model", why, FIRST)
        return None
    from fedtune.deploy.doctor.predict import look_at

    return examination.run("model", lambda: look_at(base, config))


def _memory(config: Config, shape: ModelShape, tokens: int) -> int:
    from fedtune.deploy.doctor import predict

    return predict.site_memory(config, shape, tokens, predict.process_memory())
