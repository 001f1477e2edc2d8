"""Scores of answers against the decoder's own logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedtune.base.answering import AnsweringDecoder
from fedtune.base.causal import CausalBase
from fedtune.errors import DataError

ANSWERS = ("circle", "yes", "blue")


@pytest.fixture(scope="module")
def base(answering_decoder: Path) -> CausalBase:
    return CausalBase(str(answering_decoder))


def test_scores_are_the_logits_of_the_answers_first_tokens_after_the_last(base: CausalBase) -> None:
    ids = torch.tensor([[5, 9, 11, 4], [7, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    decoder = AnsweringDecoder(base, ANSWERS)
    table = base.module.get_input_embeddings()
    with torch.no_grad():
        logits = base.module(input_ids=ids, attention_mask=mask).logits
        found = decoder.scores(table(ids), torch.tensor([4, 2]))
    first = [base.tokenizer(f" {a}", add_special_tokens=False)["input_ids"][0] for a in ANSWERS]
    assert decoder.tokens.tolist() == first
    torch.testing.assert_close(found, torch.stack([logits[0, 3, first], logits[1, 1, first]]))


def test_padding_changes_nothing(base: CausalBase) -> None:
    decoder = AnsweringDecoder(base, ANSWERS)
    x = torch.randn(1, 3, decoder.width) * 0.2
    padded = torch.cat([x, torch.full((1, 4, decoder.width), 5.0)], 1)
    with torch.no_grad():
        short, long = (decoder.scores(e, torch.tensor([3])) for e in (x, padded))
    torch.testing.assert_close(short, long)


def test_answers_that_begin_alike_are_refused(base: CausalBase) -> None:
    with pytest.raises(DataError, match=r"'yes please'.*as 'yes' does"):
        AnsweringDecoder(base, ("yes", "no", "yes please"))
