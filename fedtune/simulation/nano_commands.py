"""What `fedtune nano` does."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from fedtune.errors import RunFolderError, UsageError


@dataclass(frozen=True)
class PretrainRequest:
    """The flags of `fedtune nano pretrain-connector`."""

    out: Path
    base: str
    data: Path | None
    steps: int
    seed: int


def pretrain_connector(request: PretrainRequest, as_json: bool) -> int:
    """Pretrain a connector and write it to a new file; returns the exit code."""
    needed = ("torch", "transformers", "efficientnet_lite_pytorch", "PIL")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UsageError(f"not installed: {', '.join(missing)}; pip install 'fedtune[vqa]'")
    if request.out.exists():
        raise RunFolderError(f"{request.out} exists already; choose another --out")
    if not request.out.absolute().parent.is_dir():
        raise RunFolderError(f"{request.out}: there is no folder {request.out.absolute().parent}")
    from fedtune.base.causal import CausalBase
    from fedtune.base.connector import Pretraining
    from fedtune.base.vision import VisionEncoder
    from fedtune.data.easy_vqa import public_captions
    from fedtune.data.question_files import read_captions
    from fedtune.simulation.vision import connector_accuracy, train_connector

    captions = read_captions(request.data) if request.data else public_captions()
    kept, held_out = captions.split(0.1, request.seed)
    encoder, base = VisionEncoder(), CausalBase(request.base)
    settings = Pretraining(steps=request.steps, seed=request.seed)
    digest = train_connector(base, encoder, kept, request.out, settings, _say)
    found = connector_accuracy(base, encoder, held_out, request.out)
    size = request.out.stat().st_size
    if as_json:
        report = {"connector": str(request.out), "digest": digest, "bytes": size}
        print(json.dumps({**report, "images": len(kept), "right_words": found}))
        return 0
    words = ", ".join(f"{share:.1%}" for share in found)
    print(
        f"{request.out}: {size / 1e6:.1f} MB, from {len(kept):,} images; of {len(held_out):,} "
        f"others it says the words of a caption right in {words}\nfor federation.toml:\n\n"
        f'[base]\nconnector = "{request.out.name}"\nconnector-digest = "{digest}"'
    )
    return 0


def _say(step: int, steps: int, loss: float) -> None:
    if sys.stderr.isatty():
        end = "\n" if step == steps else ""
        print(f"\rstep {step} of {steps}, loss {loss:.3f}", end=end, file=sys.stderr, flush=True)
