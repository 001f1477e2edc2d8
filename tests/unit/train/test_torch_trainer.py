"""The trainer against a plain torch loop over peft's own parameters, tensor by tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn import functional

from fedtune.adapter.lora import AttachedAdapter, LoRA, attach_lora
from fedtune.base.classifier import BaseModel, EncoderClassifier
from fedtune.config import Train
from fedtune.data import TextExamples
from fedtune.errors import ConfigError, TrainingError
from fedtune.simulation.job import torch_settings
from fedtune.train.task import TextClassification, tokenize
from fedtune.train.texts import TokenizedTexts
from fedtune.train.torch_trainer import TorchSettings, TorchTrainer, choose_device
from fedtune.train.trainer import LocalPlan

LABELS = 3
BATCHES = [np.array([0, 5, 16, 33]), np.array([2, 1]), np.array([40, 41, 42, 3])]
RATES = [0.03, 0.0, 0.01]

Fresh = Callable[..., EncoderClassifier]


@pytest.fixture(scope="module")
def attached(fresh_classifier: Fresh) -> AttachedAdapter:
    lora = LoRA(rank=4, alpha=8.0, also_train=("classifier",))
    return attach_lora(fresh_classifier(LABELS), lora, seed=0)


@pytest.fixture(scope="module")
def start(attached: AttachedAdapter) -> np.ndarray:
    """Values of which none is zero, so that A gets a gradient too."""
    rng = np.random.default_rng(7)
    return (0.05 * rng.normal(size=attached.manifest.size)).astype(np.float32)


@pytest.fixture(scope="module")
def labels(texts: list[str]) -> np.ndarray:
    return np.random.default_rng(1).integers(0, LABELS, len(texts))


@pytest.fixture(scope="module")
def data(minilm: BaseModel, texts: list[str], labels: np.ndarray) -> TokenizedTexts:
    return tokenize(minilm.tokenizer, TextExamples(tuple(texts), labels), 64)


def _trainer(attached: AttachedAdapter, **settings: Any) -> TorchTrainer:
    task = TextClassification(pad_id=0)
    return TorchTrainer(attached, task, "ab" * 32, TorchSettings(**settings))


def _plan(rates: list[float] = RATES, seed: int = 4) -> LocalPlan:
    return LocalPlan(iter(BATCHES), iter(rates), seed)


class _Plain:
    """MiniLM with LoRA, by peft and torch alone."""

    def __init__(
        self, module: EncoderClassifier, tokenizer: Any, texts: list[str], labels: np.ndarray
    ) -> None:
        config = LoraConfig(
            r=4,
            lora_alpha=8.0,
            target_modules=["query", "value"],
            modules_to_save=["classifier"],
        )
        self.module = get_peft_model(module, config)
        self.tokenizer, self.texts = tokenizer, texts
        self.labels = torch.from_numpy(labels)

    def load(self, tensors: dict[str, np.ndarray]) -> None:
        state = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
        set_peft_model_state_dict(self.module, state)

    def logits(self, rows: np.ndarray) -> torch.Tensor:
        texts = [self.texts[row] for row in rows]
        batch = self.tokenizer(texts, padding=True, return_tensors="pt")
        return self.module(batch["input_ids"], batch["attention_mask"])

    def train(self, optimizer_class: type, clip: float | None, **arguments: Any) -> list[float]:
        self.module.eval()  # MiniLM's own dropout is off in training too
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        optimizer = optimizer_class(parameters, **arguments)
        losses = []
        for rows, rate in zip(BATCHES, RATES, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            loss = functional.cross_entropy(self.logits(rows), self.labels[rows])
            loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            losses.append(loss.item())
        return losses

    def tensors(self) -> dict[str, np.ndarray]:
        state = get_peft_model_state_dict(self.module)
        return {name: value.detach().numpy() for name, value in state.items()}


@pytest.fixture(scope="module")
def plain(
    fresh_classifier: Fresh, minilm: BaseModel, texts: list[str], labels: np.ndarray
) -> _Plain:
    return _Plain(fresh_classifier(LABELS), minilm.tokenizer, texts, labels)


@pytest.mark.parametrize(
    ("settings", "optimizer", "arguments"),
    [
        ({"optimizer": "adamw", "weight_decay": 0.1}, torch.optim.AdamW, {"weight_decay": 0.1}),
        ({"optimizer": "sgd", "weight_decay": 0.1}, torch.optim.SGD, {"weight_decay": 0.1}),
        ({"optimizer": "sgd", "max_grad_norm": 0.05}, torch.optim.SGD, {"clip": 0.05}),
        ({"optimizer": "adamw"}, torch.optim.AdamW, {"weight_decay": 0.0}),
    ],
    ids=["adamw", "sgd", "clipped", "no-decay"],
)
def test_three_steps_are_those_of_a_plain_loop(
    attached: AttachedAdapter,
    plain: _Plain,
    data: TokenizedTexts,
    start: np.ndarray,
    settings: dict[str, Any],
    optimizer: type,
    arguments: dict[str, Any],
):
    clip = arguments.pop("clip", None) if "clip" in arguments else None
    result = _trainer(attached, **settings).train(start, data, _plan())
    plain.load(attached.manifest.split(start))
    losses = plain.train(optimizer, clip, lr=1.0, **arguments)
    theirs = attached.manifest.join(plain.tensors())
    assert np.abs(result.adapter - theirs).max() < 1e-6
    assert np.abs(result.adapter - start).max() > 1e-4
    assert result.loss == pytest.approx(np.mean(losses), abs=1e-6)
    if clip is not None:
        # Two steps of length at most rate × norm, however the gradients point.
        assert np.linalg.norm(result.adapter - start) <= 0.05 * sum(RATES) * (1 + 1e-4)


def test_training_starts_afresh_each_time(
    attached: AttachedAdapter, data: TokenizedTexts, start: np.ndarray
):
    trainer = _trainer(attached)
    first = trainer.train(start, data, _plan())
    torch.manual_seed(99)  # nothing depends on a state that others share
    again = trainer.train(start, data, _plan())
    assert np.array_equal(first.adapter, again.adapter)
    assert first.loss == again.loss


def test_dropout_is_driven_by_the_plans_seed(
    fresh_classifier: Fresh, data: TokenizedTexts, start: np.ndarray
):
    lora = LoRA(rank=4, alpha=8.0, dropout=0.5, also_train=("classifier",))
    trainer = _trainer(attach_lora(fresh_classifier(LABELS), lora, seed=0))
    first = trainer.train(start, data, _plan(seed=4))
    assert trainer.train(start, data, _plan(seed=4)).loss == first.loss
    assert trainer.train(start, data, _plan(seed=5)).loss != first.loss
    without = _trainer(trainer._adapter)
    assert without.evaluate(start, data).loss == without.evaluate(start, data).loss


def test_evaluation_is_cross_entropy_over_all_rows(
    attached: AttachedAdapter,
    plain: _Plain,
    data: TokenizedTexts,
    start: np.ndarray,
    labels: np.ndarray,
):
    result = _trainer(attached).evaluate(start, data)
    plain.load(attached.manifest.split(start))
    plain.module.eval()
    with torch.inference_mode():
        logits = plain.logits(np.arange(80))
    expected = functional.cross_entropy(logits, plain.labels, reduction="sum").item()
    assert result.examples == 80
    assert result.loss_sum == pytest.approx(expected, rel=1e-5)
    assert result.loss == pytest.approx(expected / 80, rel=1e-5)
    # Predictions and labels may be in any order, but in the same one.
    pairs = zip(result.predictions.tolist(), result.labels.tolist(), strict=True)
    assert Counter(pairs) == Counter(zip(logits.argmax(1).tolist(), labels.tolist(), strict=True))
    assert result.correct == int((logits.argmax(1).numpy() == labels).sum())
    assert result.accuracy == result.correct / 80
    assert len(set(result.predictions.tolist())) > 1


def test_evaluation_leaves_the_next_training_as_it_is(
    attached: AttachedAdapter, data: TokenizedTexts, start: np.ndarray
):
    trainer = _trainer(attached)
    first = trainer.train(start, data, _plan())
    trainer.evaluate(start * 2, data.select(np.arange(9)))
    assert np.array_equal(trainer.train(start, data, _plan()).adapter, first.adapter)


@pytest.mark.parametrize("rates", [[1e38, 1e38, 1e38], [float("nan"), 0.0, 0.0]])
def test_training_that_diverges_is_an_error(
    attached: AttachedAdapter, data: TokenizedTexts, start: np.ndarray, rates: list[float]
):
    with pytest.raises(TrainingError, match="finite"):
        _trainer(attached, optimizer="sgd").train(start, data, _plan(rates=rates))
    # The next client on the same resident model is not affected.
    good = _trainer(attached).train(start, data, _plan())
    assert np.isfinite(good.adapter).all()


def test_as_many_rates_as_batches(
    attached: AttachedAdapter, data: TokenizedTexts, start: np.ndarray
):
    with pytest.raises(ValueError, match="shorter"):
        _trainer(attached).train(start, data, _plan(rates=[0.1]))


def test_bf16_computes_in_bfloat16_and_keeps_the_adapter_in_float32(
    attached: AttachedAdapter, data: TokenizedTexts, start: np.ndarray
):
    exact = _trainer(attached).evaluate(start, data)
    rough = _trainer(attached, precision="bf16").evaluate(start, data)
    assert rough.loss == pytest.approx(exact.loss, rel=0.02)
    assert rough.loss != exact.loss
    full = _trainer(attached).train(start, data, _plan())
    half = _trainer(attached, precision="bf16").train(start, data, _plan())
    assert half.loss == pytest.approx(full.loss, rel=0.02)
    assert half.loss != full.loss
    assert half.adapter.dtype == np.float32
    # Values that bfloat16 does not have: the low half of a float32 is in use.
    assert (half.adapter.view(np.uint32) & 0xFFFF).any()


def test_features_are_the_untouched_bases(
    attached: AttachedAdapter, minilm: BaseModel, data: TokenizedTexts, texts: list[str]
):
    trainer = _trainer(attached)
    attached.write(np.ones(attached.manifest.size, np.float32))
    features = trainer.features(data)
    batch = minilm.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = minilm.encoder(**batch)[0]
    mask = batch["attention_mask"].unsqueeze(-1)
    expected = ((states * mask).sum(1) / mask.sum(1)).numpy()
    assert np.abs(features - expected).max() < 1e-5


def test_settings_come_from_the_configuration():
    train = Train(optimizer="sgd", weight_decay=0.5, max_grad_norm=2.0, precision="bf16")
    assert torch_settings(train) == TorchSettings("sgd", 0.5, 2.0, "bf16")


def test_choose_device():
    assert choose_device("cpu") == torch.device("cpu")
    beyond = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ConfigError, match="cuda"):
        choose_device(beyond)
    if torch.cuda.is_available():
        assert choose_device("auto") == torch.device("cuda")
    elif torch.backends.mps.is_available():
        assert choose_device("auto") == torch.device("mps")
    else:
        assert choose_device("auto") == torch.device("cpu")
        with pytest.raises(ConfigError, match="mps"):
            choose_device("mps")
