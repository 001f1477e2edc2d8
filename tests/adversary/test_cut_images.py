"""What is on an image is what its tokens say, unless there is noise on them.

Real images, encoder and connector; the attacker learns from public images and is measured on
private ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from adversary.feature_inversion import Pictures, attack, best_guess, read_pictures
from adversary.smollm2_table import load_token_table
from numpy.typing import NDArray
from scipy import stats

from fedtune.adapter.nano import NanoAdapter
from fedtune.base.connector import Pretraining, pretrain
from fedtune.base.vision import VisionEncoder
from fedtune.data import PartitionSpec
from fedtune.data.easy_vqa import load_easy_vqa
from fedtune.privacy.metric import MetricPrivacy
from fedtune.privacy.randomness import SecureRandom

CLIP = 4.0
PUBLIC, PRIVATE = 240, 120
Z = float(stats.norm.isf(1e-9))


@dataclass(frozen=True)
class Sent:
    """Image tokens, float32 `[n, 2, width]`, public ones first, and what is on the images."""

    tokens: NDArray[np.float32]
    pictures: Pictures


@pytest.fixture(scope="module")
def sent() -> Sent:
    torch.set_num_threads(1)
    # Of the public images some play the private ones: all have captions, and connector and attacker
    # are shown the first ones only.
    public = load_easy_vqa(partition=PartitionSpec.parse("iid"), clients=1, seed=0).public
    files, words = public.files[: PUBLIC + PRIVATE], public.words[: PUBLIC + PRIVATE]
    features = VisionEncoder().features(files)
    table = load_token_table()
    captions = np.stack([table.rows[[table.word(w) for w in row]] for row in words[:PUBLIC]])
    connector = pretrain(features[:PUBLIC], captions, Pretraining(steps=150))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        adapter = NanoAdapter(table.width, 32, float(connector.length) / table.width**0.5)
        torch.nn.init.normal_(adapter.up.weight, std=0.3)
    with torch.inference_mode():
        tokens = adapter(connector(torch.from_numpy(features.astype(np.float32))))
    return Sent(tokens.numpy(), read_pictures(files, words))


def _attack(sent: Sent, eta: float | None):
    if eta is None:
        return attack(sent.tokens, sent.pictures, PUBLIC, epochs=25)
    privacy, random = MetricPrivacy(CLIP, eta), SecureRandom()
    return attack(
        sent.tokens, sent.pictures, PUBLIC, lambda rows: privacy.release(rows, random), epochs=25
    )


def test_without_noise_colour_and_shape_are_read(sent: Sent) -> None:
    found, guess = _attack(sent, None), best_guess(sent.pictures, PUBLIC)
    assert guess.colours < 0.35
    assert guess.shapes < 0.55
    assert found.colours > 0.85
    assert found.shapes > 0.9


def test_noise_brings_the_attacker_near_to_guessing(sent: Sent) -> None:
    weak, strong = _attack(sent, 400.0), _attack(sent, 3.0)
    assert weak.colours > 0.8  # a local epsilon of 3,200 for each token hides nothing
    assert weak.shapes > 0.85
    # At 24, chance is left: one of eight colours, one of three shapes, within statistics.
    colours, shapes = 1 + sent.pictures.colours.max(), 1 + sent.pictures.shapes.max()
    for share, kinds in ((strong.colours, colours), (strong.shapes, shapes)):
        assert share < 1 / kinds + 0.05 + Z * np.sqrt(1 / kinds * (1 - 1 / kinds) / PRIVATE)


def test_where_the_shape_is_does_not_pass_the_connector(sent: Sent) -> None:
    # The connector was taught two words. A linear attacker gains next to nothing on the mean image,
    # even without noise: what is hidden of the pixels is hidden by the connector.
    found, guess = _attack(sent, None), best_guess(sent.pictures, PUBLIC)
    assert found.error > 0.85 * guess.error
