"""The emulator of a decoder that a configuration asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedtune.base.answering import first_tokens
from fedtune.base.causal import CausalBase
from fedtune.base.emulator import Emulator, write_emulator
from fedtune.base.layers import (
    FEWEST,
    LayerPlan,
    check_fewer,
    layer_states,
    plan_layers,
    similarities,
)
from fedtune.cache import cache_folder
from fedtune.config import Config
from fedtune.errors import BaseModelError, ConfigError
from fedtune.train.question_rows import PROMPT
from fedtune.types import digest_of

_FORMAT = 1  # part of the cache's name: raise it with every change of how one is made


def make_emulator(
    config: Config, base: CausalBase, answers: Sequence[str], public: Sequence[str], folder: Path
) -> tuple[LayerPlan, str]:
    """Make one in the new `folder`, of what the decoder says to `public` questions.

    Its plan and its digest; raises `BaseModelError` or `ConfigError`.
    """
    layers = int(base.config.num_hidden_layers)
    keep = config.emulator.layers or max(FEWEST, layers // 2)
    check_fewer(keep, layers)  # before minutes are spent on a larger decoder's states
    texts = [PROMPT.format(question=question) for question in public]
    similarity = similarities(layer_states(base, texts))
    plan = plan_layers(similarity, keep, config.emulator.share)
    return plan, write_emulator(folder, base, answers, plan)


def find_emulator(
    config: Config, base: CausalBase, answers: Sequence[str], public: Sequence[str]
) -> Emulator:
    """The emulator that the configuration names, or one made of `public` questions in the cache.

    Raises `BaseModelError` or `ConfigError`.
    """
    tokens = first_tokens(base.tokenizer, answers)
    if config.emulator.path is not None:
        named = Emulator(Path(config.emulator.path).expanduser(), tokens, config.emulator.digest)
        check_emulator(config, base.digest, named)
        return named
    if not public:
        raise ConfigError("emulator.path is missing; make one with: fedtune nano emulator")
    folder = _cached(config, base, answers, public)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        make_emulator(config, base, answers, public, folder)
    return Emulator(folder, tokens, config.emulator.digest)


def check_emulator(config: Config, base_digest: str, emulator: Emulator) -> None:
    """Raise `ConfigError` unless it is of this base model and has the agreed layers."""
    wanted, manifest = config.emulator, emulator.manifest
    if manifest.base_digest != base_digest:
        raise ConfigError(
            f"{emulator.folder}: made of the base model {manifest.base_digest}, this one is "
            f"{base_digest}; make one of this: fedtune nano emulator"
        )
    kept, shared = len(manifest.plan.kept), manifest.plan.shared
    if wanted.layers not in (None, kept) or wanted.share != shared:
        raise ConfigError(
            f"{emulator.folder}: {emulator.words}, which is not what emulator.layers and "
            "emulator.share say; make one: fedtune nano emulator"
        )


def _cached(
    config: Config, base: CausalBase, answers: Sequence[str], public: Sequence[str]
) -> Path:
    """Where one is kept that was made of these; raises `BaseModelError` without such a place."""
    cache = cache_folder()
    if cache is None:
        raise BaseModelError(
            "there is no home folder to keep an emulator in; make one with: fedtune nano "
            "emulator, and set emulator.path"
        )
    own = config.emulator
    made_of = [_FORMAT, base.digest, own.layers, own.share, list(answers), list(public)]
    return cache / f"emulator-{digest_of(made_of)[:32]}"
