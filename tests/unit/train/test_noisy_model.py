"""The model that is simulated sends what its configuration says, in training and in evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from fedtune.adapter.nano import Prompt
from fedtune.base.connector import Connector, save_connector
from fedtune.config import parse_config
from fedtune.records import ClientSummary
from fedtune.report.cut_noise import cut_noise
from fedtune.simulation import vision
from fedtune.simulation.cut_account import account
from fedtune.train.batches import plan_batches
from fedtune.train.channel import CutTraffic
from fedtune.train.cut import InProcessBase

NOISE = ("split.clip=2.0", "split.eta=5.0")
WIDTH = 64


class Watched(InProcessBase):
    """The server's half, which keeps what it got."""

    seen: ClassVar[list[np.ndarray]] = []

    def outputs(self, embeddings: Any, lengths: Any) -> Any:
        self.seen.append(embeddings)
        return super().outputs(embeddings, lengths)

    def differentiate(self, embeddings: Any, lengths: Any, labels: Any) -> Any:
        self.seen.append(embeddings)
        return super().differentiate(embeddings, lengths, labels)


@pytest.fixture
def model(tiny_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the model of a configuration; what its server got is `Watched.seen`."""
    monkeypatch.setattr(vision, "InProcessBase", Watched)
    monkeypatch.setattr(Watched, "seen", [])
    path = tmp_path / "connector.safetensors"
    save_connector(Connector(1280, WIDTH, 2), path)

    def make(*overrides: str) -> vision.VisionModel:
        sets = [f'base.path="{tiny_decoder}"', f'base.connector="{path}"']
        sets += ["base.task=visual-question-answering", "adapter.kind=nano", "adapter.rank=2"]
        config = parse_config("", "test", [*sets, "base.placement=server", *overrides])
        return vision.VisionModel(config, ("femur", "renal"))

    return make


@pytest.fixture
def batch() -> tuple[Prompt, torch.Tensor]:
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(size=(3, 1280)).astype(np.float32))
    ids = torch.from_numpy(rng.integers(0, 200, (3, 5)))
    prompt = Prompt(features, torch.ones(3, dtype=torch.bool), ids, torch.ones(3, 5).long())
    return prompt, torch.tensor([0, 1, 0])


def test_noise_is_on_all_that_is_sent(model: Any, batch: Any) -> None:
    noisy = model(*NOISE)
    noisy.task.loss(noisy.adapter.module, batch).backward()
    noisy.task.outputs(noisy.adapter.module.eval(), batch)
    embeddings, _ = noisy.adapter.module(batch[0])
    training, evaluation = Watched.seen
    clear = embeddings.detach().numpy()
    clipped = clear * np.minimum(1, 2 / np.linalg.norm(clear, axis=-1, keepdims=True))
    for seen in (training, evaluation):
        length = np.linalg.norm(seen - clipped, axis=-1)
        # Gamma of shape 64 and scale 1/5: 12.8, give or take 1.6.
        assert (length > 4).all()
        assert length.mean() == pytest.approx(12.8, abs=3)
    assert not np.isclose(training, evaluation).all(-1).any()


def test_without_the_keys_there_is_none(model: Any, batch: Any) -> None:
    clear = model()
    clear.task.outputs(clear.adapter.module.eval(), batch)
    embeddings, _ = clear.adapter.module(batch[0])
    assert np.allclose(Watched.seen[0], embeddings.detach().numpy(), rtol=1e-3, atol=1e-3)


def _client(examples: int, completed: int, failed: int = 0) -> ClientSummary:
    rest = (None, None, None, None)
    return ClientSummary("site-1", examples, (examples,), completed, failed, *rest)


def test_the_account_is_of_the_client_that_sent_an_example_most_often() -> None:
    sets = ["base.task=visual-question-answering", "adapter.kind=nano", "base.placement=server"]
    sets += ["train.steps=10", "train.batch-size=8"]
    traffic = CutTraffic(trained=200, tokens=200 * 12)
    clients = [_client(1000, 5), _client(40, 4, failed=1), _client(4, 1)]
    noisy = parse_config("", "test", [*sets, *NOISE])
    found = account(noisy, traffic, clients)
    # eta · 2 · clip = 20. Five rounds of 80 examples each, out of 1,000 and out of 40; the third
    # client has less than a batch, and sends all of it in each of 10 steps.
    assert found["token_epsilon"] == 20
    assert found["passes"] == max(5 * 80 / 1000, 5 * 80 / 40, 10)
    assert found["sendings"] == max(5 * 1, 5 * 2, 10)
    assert found["example_epsilon"] == 20 * 10 * 12
    # Each round draws anew, so an example of the first client can be in all of them.
    alone = account(noisy, traffic, clients[:1])
    assert (alone["sendings"], alone["passes"]) == (5, 5 * 80 / 1000)
    assert account(parse_config("", "test", sets), traffic, clients) == {}


def test_the_report_names_the_noise_for_what_it_is() -> None:
    from fedtune.records import Cut

    plain = Cut("float16", "server", 200, 2400, 1, 1, 1, 0, 0)
    assert cut_noise(plain) is None
    noisy = Cut("float16", "server", 200, 2400, 1, 1, 1, 0, 0, 2.0, 5.0, 20.0, 2.5, 10, 2400.0)
    text = cut_noise(noisy)
    assert text is not None
    for part in (
        "metric",
        "clip 2, eta 5",
        "epsilon 20 for one token",
        "2,400",
        "up to 10 times (2.5 on",
    ):
        assert part in text
    assert Cut.from_json(noisy.to_json()) == noisy
    assert Cut.from_json(plain.to_json()) == plain


@pytest.mark.parametrize(("rows", "steps", "size"), [(40, 10, 8), (13, 9, 4), (100, 3, 8)])
def test_no_batches_send_an_example_more_often_than_the_account_says(
    rows: int, steps: int, size: int
) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(3, 12, rows)
        sent = np.bincount(np.concatenate(list(plan_batches(lengths, steps, size, rng))))
        assert sent.max() <= -(-steps * size // rows)
