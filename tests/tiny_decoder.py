"""A tiny real causal language model, as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

END = "<|end|>"


def write_tiny_decoder(
    folder: Path, texts: Sequence[str], vocabulary: int = 320, layers: int = 2
) -> Path:
    """A Llama of a few layers with random weights, 2 of 4 heads for keys, and tied embeddings.

    Its tokenizer is byte-level BPE, learned from `texts`.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)  # before any of torch's threads exist: processes are forked later
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,  # large enough that attention tells tokens apart
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(23)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder
