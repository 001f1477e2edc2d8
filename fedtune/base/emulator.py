"""A small stand-in for a decoder, for clients that train against it at their own site.

It has some of the decoder's layers, its final norm, and the rows of its output layer that belong to
the answers; it is made without training, from public texts alone (`fedtune.base.layers`). What is
trained against it is an adapter that is plugged into the whole decoder afterwards (Offsite-Tuning,
arXiv 2302.04870; CRaSh, arXiv 2310.15477).

On disk it is a Hugging Face folder of a decoder with the kept layers, each once, whose vocabulary
are the answers' first tokens; `emulator.json` says which layer stands at which place.
"""

from __future__ import annotations

import copy
import json
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from fedtune.base.answering import Answering, apart, first_tokens
from fedtune.base.causal import CausalBase
from fedtune.base.layers import LayerPlan
from fedtune.base.loading import load_frozen, transformers_config
from fedtune.base.resolve import list_base
from fedtune.errors import BaseModelError
from fedtune.files import TEMPORARY, write_atomic, write_json
from fedtune.types import sha256_hex

MANIFEST, WEIGHTS = "emulator.json", "model.safetensors"
_LARGEST_MANIFEST, _LARGEST_WEIGHTS = 1 << 20, 4 << 30
_LAYERS, _EMBEDDINGS, _HEAD = "model.layers.", "model.embed_tokens.", "lm_head."


@dataclass(frozen=True)
class EmulatorManifest:
    """What an emulator is made of: `files` by name with their SHA-256."""

    base: str
    base_digest: str
    plan: LayerPlan
    answer_tokens: tuple[int, ...]
    whole_parameters: int
    files: dict[str, str]


class Emulator(Answering):
    """An emulator in a folder, loaded and frozen, in float32."""

    def __init__(self, folder: Path, tokens: NDArray[np.int64], digest: str | None = None) -> None:
        """Read it and check its files; raises `BaseModelError`, also for another `digest`.

        `tokens` are the first ones of the federation's answers, for which it must be made.
        """
        from transformers import AutoModelForCausalLM

        self.folder = folder
        self.manifest, self.digest = read_manifest(folder, digest)
        if tuple(tokens.tolist()) != self.manifest.answer_tokens:
            raise BaseModelError(
                f"{folder}: made for other answers than data.labels; make one for these: "
                "fedtune nano emulator"
            )
        module = load_frozen(AutoModelForCausalLM, folder)
        self.parameters = sum(p.numel() for p in module.parameters())
        decoder, head = apart(module, str(folder), np.arange(len(tokens)))
        self._stand(decoder)
        super().__init__(decoder, head)

    @property
    def size(self) -> int:
        """Bytes of its files."""
        names = [MANIFEST, *self.manifest.files]
        return sum((self.folder / name).stat().st_size for name in names)

    @property
    def words(self) -> str:
        """What it is, for a person."""
        plan = self.manifest.plan
        how = "shared" if plan.shared else "the others removed"
        own, whole = self.parameters / 1e6, self.manifest.whole_parameters / 1e6
        return (
            f"{len(plan.kept)} of {plan.layers} layers, {how}; {own:.3g} of {whole:.3g} million "
            "parameters"
        )

    def _stand(self, decoder: Any) -> None:
        """Put the kept layers where the plan has them: one module at several places."""
        plan, layers = self.manifest.plan, decoder.layers
        if len(layers) != len(plan.kept):
            raise BaseModelError(f"{self.folder}: {len(layers)} layers, not {len(plan.kept)}")
        places = [plan.kept.index(layer) for layer in plan.standing]
        # Each layer keeps the number that it was built with: only a cache of keys asks for it.
        decoder.layers = nn.ModuleList(layers[place] for place in places)
        config = transformers_config(decoder)
        config.num_hidden_layers = len(places)
        if (kinds := getattr(config, "layer_types", None)) is not None:
            config.layer_types = [kinds[place] for place in places]


def write_emulator(folder: Path, base: CausalBase, answers: Sequence[str], plan: LayerPlan) -> str:
    """Make the new `folder`, weights in half precision; its digest. Raises `BaseModelError`."""
    tokens = first_tokens(base.tokenizer, answers)
    _, head = apart(base.module, base.name, tokens)
    weights = save({name: value.half() for name, value in _weights(base, plan, head).items()})
    if len(weights) > _LARGEST_WEIGHTS:
        raise BaseModelError(
            f"an emulator of {len(plan.kept)} layers has more than {_LARGEST_WEIGHTS >> 30} GiB; "
            "lower emulator.layers"
        )
    # Its own name: two simulations may want the same one in their cache at the same time.
    fresh = folder.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    try:
        fresh.mkdir(parents=True)
        _small_config(base, plan, len(tokens)).save_pretrained(fresh)
        write_atomic(fresh / WEIGHTS, weights)
        manifest = EmulatorManifest(
            base.name,
            base.digest,
            plan,
            tuple(tokens.tolist()),
            base.parameters,
            {file.name: file.sha256 for file in list_base(fresh)},
        )
        write_json(fresh / MANIFEST, asdict(manifest))
        try:
            fresh.rename(folder)
        except OSError:
            if not (folder / MANIFEST).is_file():
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return sha256_hex((folder / MANIFEST).read_bytes())


def _weights(base: CausalBase, plan: LayerPlan, head: Tensor) -> dict[str, Tensor]:
    """The kept layers, numbered anew; all that is in no layer; the answers' rows as its table."""
    place_of = {layer: place for place, layer in enumerate(plan.kept)}
    found = {f"{_EMBEDDINGS}weight": head}
    for name, value in base.module.state_dict().items():
        if name.startswith(_LAYERS):
            number, _, rest = name.removeprefix(_LAYERS).partition(".")
            if int(number) in place_of:
                found[f"{_LAYERS}{place_of[int(number)]}.{rest}"] = value
        elif not name.startswith((_EMBEDDINGS, _HEAD)):
            found[name] = value
    return {name: value.contiguous() for name, value in found.items()}


def _small_config(base: CausalBase, plan: LayerPlan, answers: int) -> Any:
    """The decoder's configuration with the kept layers, and the answers as its vocabulary."""
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # how the whole one lies on disk
    config.num_hidden_layers = len(plan.kept)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[layer] for layer in plan.kept]
    config.vocab_size, config.tie_word_embeddings = answers, True
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    return config


def read_manifest(folder: Path, digest: str | None = None) -> tuple[EmulatorManifest, str]:
    """What the emulator in `folder` is, its files being those that are named, and its digest.

    Raises `BaseModelError`, also for another `digest`.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _LARGEST_MANIFEST:
            raise ValueError("too large")
        if (folder / WEIGHTS).stat().st_size > _LARGEST_WEIGHTS:
            raise ValueError(f"{WEIGHTS} is too large")
        data = path.read_bytes()
        fields = json.loads(data)
        plan = fields.pop("plan")
        manifest = EmulatorManifest(
            plan=LayerPlan(tuple(plan.pop("standing")), **plan),
            answer_tokens=tuple(fields.pop("answer_tokens")),
            **fields,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BaseModelError(
            f"{path}: not an emulator of a base model: {error}; the operator makes one with: "
            "fedtune nano emulator"
        ) from error
    found = sha256_hex(data)
    if digest is not None and found != digest:
        raise BaseModelError(
            f"{folder}: its digest is {found}, emulator.digest says {digest}; this is another "
            "emulator, or it has changed"
        )
    if {file.name: file.sha256 for file in list_base(folder)} != manifest.files:
        raise BaseModelError(f"{folder}: its files are not those that {MANIFEST} names")
    return manifest, found
