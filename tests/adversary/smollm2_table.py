"""Token table and tokenizer of the packaged SmolLM2, without its layers: three seconds, not twenty.

Both are public: an attacker who hosts the model has them, and so has anyone else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers

from fedtune.base.resolve import gguf_file, resolve_base
from fedtune.train.question_rows import PROMPT

NAME = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class TokenTable:
    """`rows` are float32 `[tokens, width]`."""

    rows: NDArray[np.float32]
    tokenizer: Tokenizer

    @property
    def width(self) -> int:
        """Length of an embedding."""
        return self.rows.shape[1]

    def ids(self, question: str) -> list[int]:
        """The tokens of a question as `train.question_rows` asks it."""
        return list(self.tokenizer.encode(PROMPT.format(question=question)).ids)

    def word(self, word: str) -> int:
        """The first token of a word in the middle of a text."""
        return int(self.tokenizer.encode(f" {word}").ids[0])


def load_token_table(name: str = NAME) -> TokenTable:
    """The table of a base model in a GGUF file."""
    import gguf

    folder = resolve_base(name)
    file = gguf_file(folder)
    if file is None:
        raise ValueError(f"{name} has no GGUF file")
    reader = gguf.GGUFReader(folder / file)
    (tensor,) = (tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    tokens: list[Any] = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(pair.split(" ")) for pair in reader.fields["tokenizer.ggml.merges"].contents()]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    return TokenTable(rows, tokenizer)
