"""A causal language model: a Hugging Face decoder with its own output layer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fedtune.base.loading import (
    first_line,
    load_config,
    load_frozen,
    load_tokenizer,
    longest_text,
    open_base,
    transformers_config,
)
from fedtune.errors import BaseModelError


class CausalBase:
    """A frozen decoder with its tokenizer and digest, loaded once per process."""

    def __init__(self, name: str, expected: str | None = None) -> None:
        """Load `name` (see `resolve_base`), whose digest must be `expected`, if that is given.

        Raises `BaseModelError`.
        """
        from transformers import AutoModelForCausalLM

        self.name = name
        self.folder, self.digest = open_base(name, expected)
        self.module = load_frozen(AutoModelForCausalLM, self.folder)
        self.config = transformers_config(self.module)
        self.parameters = sum(p.numel() for p in self.module.parameters())
        self.tokenizer = load_tokenizer(self.folder)
        if self.tokenizer.eos_token_id is None:
            raise BaseModelError(
                f"base model {self.folder}: its tokenizer has no token for the end of a text"
            )
        if looks_ahead(self.module):
            raise BaseModelError(
                f"base model {self.folder}: '{self.config.model_type}' is not a causal language "
                "model: what it says of a token depends on those that follow"
            )

    @property
    def max_tokens(self) -> int:
        """The longest text that the decoder has positions for."""
        return longest_text(self.config)

    @property
    def end_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)


def position_logits(module: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of the token that follows each, float32 `[batch · tokens, vocabulary]`.

    `ids` and `mask` are int64 `[batch, tokens]`.
    """
    logits: Tensor = module(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits.flatten(0, 1).float()


def looks_ahead(module: nn.Module) -> bool:
    """Whether the logits of a text's first tokens depend on the last one."""
    module.eval()
    with torch.inference_mode():
        one = torch.ones((1, 1), dtype=torch.int64)
        size = position_logits(module, one, one).shape[1]
        ids = torch.tensor([[size // 2, size // 3, size // 4], [size // 2, size // 3, size // 5]])
        logits = position_logits(module, ids, torch.ones_like(ids))
    found = logits.view(*ids.shape, -1)
    change = (found[0] - found[1])[:-1].abs().max()
    return bool(change > 1e-3 * found.abs().max())  # far above rounding, far below attention


def causal_outline(folder: Path) -> nn.Module:
    """The decoder without any weights, on the meta device: shapes, and no memory.

    Raises `BaseModelError`.
    """
    from transformers import AutoModelForCausalLM

    try:
        config = load_config(folder)
        with torch.device("meta"):
            module: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            return module.requires_grad_(False)
    except Exception as error:  # transformers raises its own kinds for broken configurations
        raise BaseModelError(
            f"base model {folder}: cannot be understood: {first_line(error)}"
        ) from error
