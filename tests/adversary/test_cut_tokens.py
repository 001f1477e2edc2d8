"""Which words a question has is what its embeddings say, unless there is noise on them.

Real token table (SmolLM2), the client's own code up to the bytes that leave, an adapter that moves
embeddings by half their length. Noise cannot be seeded, so shares are bounded with the margin of a
binomial draw, not with numbers that once came out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from adversary.cut_server import WatchingServer
from adversary.smollm2_table import TokenTable, load_token_table
from adversary.token_inversion import (
    adapted_table,
    likeliest_question,
    likeliest_tokens,
    nearest_tokens,
)
from numpy.typing import NDArray
from scipy import stats
from torch import nn

from fedtune.adapter.nano import ClientHalf, Nano, Prompt, attach_nano
from fedtune.base.connector import Connector
from fedtune.config import Split
from fedtune.train.activations import Encoding
from fedtune.train.channel import Meter, in_process_channel
from fedtune.train.cut import AcrossCut
from fedtune.train.protection import protected

CLIP = 4.0
ANSWERS = 13
Z = float(stats.norm.isf(1e-9))
COLOURS = ("red", "green", "blue", "black", "gray", "teal", "brown", "yellow")
QUESTIONS = [
    *(f"is there a {colour} shape in the image?" for colour in COLOURS),
    *(f"is there not a {colour} shape?" for colour in COLOURS),
    "what color is the circle?",
    "what color is the rectangle?",
    "what is the color of the triangle?",
    "what shape is in the image?",
    "does the image not contain a circle?",
    "is a rectangle present?",
]


@dataclass(frozen=True)
class Site:
    """A client whose questions go through the cut, and what the server knows of it."""

    table: TokenTable
    half: ClientHalf
    ids: list[list[int]]
    rows: NDArray[np.float32]  # every token as it is sent without noise
    clipped: NDArray[np.float32]  # and clipped

    @property
    def truth(self) -> NDArray[np.int64]:
        return np.concatenate([np.array(ids) for ids in self.ids])

    def send(self, encoding: Encoding = "float16", **split: float) -> list[NDArray[np.float32]]:
        """What the server gets of each question, `[tokens, width]`."""
        server = WatchingServer(self.table.width, ANSWERS)
        remote = in_process_channel(server, server.width, encoding, Meter())
        behind = AcrossCut(protected(remote, Split(activations=encoding, **split)))
        longest = max(map(len, self.ids))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in self.ids])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in self.ids])
        none = torch.zeros(len(ids), self.half.connector.features)
        prompt = Prompt(none, torch.zeros(len(ids), dtype=torch.bool), ids, mask)
        with torch.inference_mode():
            behind.scores(*self.half(prompt))
        (seen,) = server.seen
        return seen


@pytest.fixture(scope="module")
def site() -> Site:
    torch.set_num_threads(1)
    table = load_token_table()
    embeddings = nn.Embedding.from_pretrained(torch.from_numpy(table.rows))
    connector = Connector(8, table.width, 2)
    connector.length.fill_(float(np.linalg.norm(table.rows, axis=1).mean()))
    half = attach_nano(connector, embeddings, Nano(32), 0).module
    assert isinstance(half, ClientHalf)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        half.nano_text.up.weight.normal_(std=0.3)
    rows = adapted_table(table.rows, half.nano_text)
    moved = np.linalg.norm(rows - table.rows, axis=1) / np.linalg.norm(table.rows, axis=1)
    assert 0.4 < moved.mean() < 1
    return Site(
        table,
        half,
        [table.ids(question) for question in QUESTIONS],
        rows,
        adapted_table(table.rows, half.nano_text, CLIP),
    )


def share(found: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    return float((found == truth).mean())


@pytest.mark.parametrize("encoding", ["float16", "int8"])
def test_without_noise_every_token_is_read(site: Site, encoding: Encoding) -> None:
    seen = np.concatenate(site.send(encoding))
    assert share(nearest_tokens(seen, site.rows), site.truth) == 1
    # Without the adapter, too: it moves embeddings, it does not encrypt them.
    assert share(nearest_tokens(seen, site.table.rows), site.truth) > 0.95


def test_clipping_alone_hides_nothing(site: Site) -> None:
    # An eta so large that there is next to no noise.
    seen = np.concatenate(site.send(clip=CLIP, eta=1e7))
    assert share(nearest_tokens(seen, site.clipped), site.truth) == 1


def _pair_error(gap: float, eta: float, width: int) -> float:
    """Chance that the likeliest of two rows `gap` apart is the wrong one, for noise of `eta`.

    Along a line, noise of so many dimensions is normal to within a per cent; its variance there is
    E[r²]/d, and r is Gamma(d, 1/eta): (d + 1) / eta².
    """
    return float(stats.norm.sf(gap / 2 / (np.sqrt(width + 1) / eta)))


@pytest.mark.parametrize("eta", [60.0, 30.0, 15.0])
def test_two_words_are_confused_as_often_as_the_noise_says(site: Site, eta: float) -> None:
    # The attacker knows that it is one of two. Too little noise, as by a factor of the square root
    # of the width, or noise on the length only, and it is hardly ever wrong; too much, and it errs
    # too often.
    place = next(i for i, q in enumerate(QUESTIONS) if q.startswith("is there a red"))
    ids = site.ids[place]
    red, blue = site.table.word("red"), site.table.word("blue")
    where = ids.index(red)
    pair = site.clipped[[red, blue]]
    times = 400
    many = Site(site.table, site.half, [ids] * times, site.rows, site.clipped)
    seen = np.stack([tokens[where] for tokens in many.send(clip=CLIP, eta=eta)])
    wrong = float((nearest_tokens(seen, pair) == 1).mean())
    expected = _pair_error(float(np.linalg.norm(pair[0] - pair[1])), eta, site.table.width)
    margin = Z * np.sqrt(max(expected * (1 - expected), 1 / times) / times)
    assert abs(wrong - expected) < margin + 0.01


def test_noise_hides_most_tokens_from_who_knows_nothing_else(site: Site) -> None:
    truth = site.truth
    found = {}
    for eta in (400.0, 20.0, 5.0):
        seen = np.concatenate(site.send(clip=CLIP, eta=eta))
        found[eta] = share(nearest_tokens(seen, site.clipped), truth)
    # At a local epsilon of 3,200 for each token nothing is hidden; at 160 most, at 40 all.
    assert found[400.0] == 1
    assert found[20.0] < 0.4
    assert found[5.0] < 0.05


def test_the_same_token_sent_again_and_again_comes_to_light(site: Site) -> None:
    # Why the epsilons of all sendings add up.
    eta, truth = 20.0, site.truth
    copies = np.stack([np.concatenate(site.send(clip=CLIP, eta=eta)) for _ in range(8)])
    once = share(likeliest_tokens(copies[:1], site.clipped), truth)
    often = share(likeliest_tokens(copies, site.clipped), truth)
    assert once < 0.4
    assert often > 0.8


def test_who_knows_what_is_asked_needs_far_less(site: Site) -> None:
    # Why a small share of tokens recovered is no promise: a form with twenty questions is read
    # off noise under which single tokens are hidden.
    seen: Sequence[NDArray[np.float32]] = site.send(clip=CLIP, eta=20.0)
    by_token = share(nearest_tokens(np.concatenate(seen), site.clipped), site.truth)
    whole = likeliest_question(seen, site.ids, site.clipped)
    assert (whole == np.arange(len(site.ids))).mean() > by_token + 0.2


def test_lengths_are_not_hidden(site: Site) -> None:
    assert [len(tokens) for tokens in site.send(clip=CLIP, eta=5.0)] == list(map(len, site.ids))
