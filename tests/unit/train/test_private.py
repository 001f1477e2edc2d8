"""DP-SGD against torch.func, opacus, plain torch and the statistics that it promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from peft import get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from fedtune.adapter.lora import AttachedAdapter, LoRA, attach_lora
from fedtune.base.classifier import BaseModel, EncoderClassifier
from fedtune.data import TextExamples
from fedtune.errors import ConfigError, TrainingError
from fedtune.privacy.accountant import sampling_rate
from fedtune.privacy.randomness import SecureRandom
from fedtune.train.private import RecordPrivacy, clipped_sum, poisson_rows, private_gradient
from fedtune.train.task import CustomTask, Rows, TextClassification, tokenize
from fedtune.train.texts import TokenizedTexts
from fedtune.train.torch_private import example_gradient
from fedtune.train.torch_trainer import TorchSettings, TorchTrainer
from fedtune.train.trainer import LocalPlan

LABELS = 3
HUGE = 1e9
CPU = torch.device("cpu")
TEXT_ROWS = np.array([0, 5, 16, 33, 33, 2])

Fresh = Callable[..., EncoderClassifier]
Loss = Callable[[nn.Module, Any], Tensor]


@pytest.fixture(scope="module")
def encoder(fresh_classifier: Fresh) -> AttachedAdapter:
    lora = LoRA(rank=4, alpha=8.0, also_train=("classifier",))
    attached = attach_lora(fresh_classifier(LABELS), lora, seed=0)
    attached.write(_start(attached))
    return attached


@pytest.fixture(scope="module")
def text_data(minilm: BaseModel, texts: list[str]) -> TokenizedTexts:
    labels = np.random.default_rng(1).integers(0, LABELS, len(texts))
    return tokenize(minilm.tokenizer, TextExamples(tuple(texts), labels), 64)


def _start(attached: AttachedAdapter) -> np.ndarray:
    """Values of which none is zero, so that A gets a gradient too."""
    rng = np.random.default_rng(7)
    return (0.05 * rng.normal(size=attached.manifest.size)).astype(np.float32)


def _module(inputs: int = 6, hidden: int = 8) -> nn.Sequential:
    """A user's own module."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module = nn.Sequential()
        module.add_module("inner", nn.Linear(inputs, hidden))
        module.add_module("bend", nn.Tanh())
        module.add_module("head", nn.Linear(hidden, LABELS))
    return module


def _attach(module: nn.Module, dropout: float = 0.0) -> AttachedAdapter:
    lora = LoRA(rank=2, alpha=4.0, dropout=dropout, targets=("inner",), also_train=("head",))
    attached = attach_lora(module, lora, seed=0)
    attached.write(_start(attached))
    return attached


def _rows(n: int, inputs: int = 6) -> Rows:
    values = np.random.default_rng(2).normal(size=(n, inputs)).astype(np.float32)
    return Rows([(torch.from_numpy(x), int(abs(x[0]) * 10) % LABELS) for x in values])


def _numbered(n: int) -> Rows:
    """Rows whose target is their own number."""
    return Rows([(x, place) for place, (x, _) in enumerate(_rows(n).rows)])


def _trainer(
    attached: AttachedAdapter,
    loss: Loss | None = None,
    noise: float = 0.0,
    clip: float = HUGE,
    **settings: Any,
) -> TorchTrainer:
    settings = {"optimizer": "sgd", "record_privacy": RecordPrivacy(noise, clip), **settings}
    return TorchTrainer(attached, CustomTask(loss), "ab" * 32, TorchSettings(**settings))


def _plan(batch_size: int, steps: int = 1, lr: float = 1.0, seed: int = 4) -> LocalPlan:
    return LocalPlan(iter(()), iter([lr] * steps), seed, batch_size)


def _example_loss(attached: AttachedAdapter, task: Any, data: Any) -> Callable[[int], Tensor]:
    attached.train_mode()
    return lambda row: task.loss(attached.module, task.batch(data, np.array([row]), CPU))


def _sum(
    attached: AttachedAdapter, loss: Callable[[int], Tensor], rows: np.ndarray, clip: float
) -> np.ndarray:
    gradient = example_gradient(attached, loss, SecureRandom())
    return clipped_sum(gradient, attached.manifest.size, rows, clip)


def _close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> bool:
    return bool(np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected))


# What each example's gradient is.


def test_gradients_of_single_texts_are_those_of_a_plain_peft_model(
    encoder: AttachedAdapter,
    fresh_classifier: Fresh,
    minilm: BaseModel,
    text_data: TokenizedTexts,
    texts: list[str],
):
    theirs = get_peft_model(fresh_classifier(LABELS), encoder.peft_config)
    tensors = encoder.manifest.split(encoder.read())
    set_peft_model_state_dict(theirs, {n: torch.from_numpy(v.copy()) for n, v in tensors.items()})
    theirs.eval()
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    loss = _example_loss(encoder, TextClassification(0), text_data)
    # Both peft models list their parameters in the order of the modules; `flat` has another.
    places = {p.data_ptr(): p.storage_offset() for p in encoder.module.parameters()}
    ours = [p for p in encoder.module.parameters() if p.requires_grad]
    for row in TEXT_ROWS:
        batch = minilm.tokenizer([texts[row]], return_tensors="pt")
        logits = theirs(batch["input_ids"], batch["attention_mask"])
        label = torch.tensor([int(text_data.labels[row])])
        gradients = torch.autograd.grad(functional.cross_entropy(logits, label), parameters)
        expected = np.empty(encoder.manifest.size)
        for parameter, gradient in zip(ours, gradients, strict=True):
            start = places[parameter.data_ptr()]
            expected[start : start + gradient.numel()] = gradient.reshape(-1).numpy()
        assert _close(_sum(encoder, loss, np.array([row]), HUGE), expected)
        assert np.linalg.norm(expected) > 0.01


def _token_mean(module: nn.Module, batch: Any) -> Tensor:
    """Not a mean of losses of examples: what a batch hides in its divisor."""
    inputs, mask, target = batch
    losses = functional.cross_entropy(module(inputs).transpose(1, 2), target, reduction="none")
    return (losses * mask).sum() / mask.sum()


def test_gradients_of_a_users_loss_do_not_depend_on_the_other_examples():
    attached = _attach(_module())
    rng = np.random.default_rng(8)
    inputs = torch.from_numpy(rng.normal(size=(9, 5, 6)).astype(np.float32))
    mask = (torch.arange(5) < torch.from_numpy(rng.integers(1, 6, (9, 1)))).float()
    target = torch.from_numpy(rng.integers(0, LABELS, (9, 5)))
    data = Rows(list(zip(inputs, mask, target, strict=True)))
    attached.train_mode()
    named = {n: p for n, p in attached.module.named_parameters() if p.requires_grad}

    def example(parameters: dict[str, Tensor], x: Tensor, m: Tensor, t: Tensor) -> Tensor:
        logits = functional_call(attached.module, parameters, (x,))
        return (functional.cross_entropy(logits, t, reduction="none") * m).sum() / m.sum()

    detached = {name: p.detach() for name, p in named.items()}
    found = vmap(grad(example), in_dims=(None, 0, 0, 0))(detached, inputs, mask, target)
    expected = np.empty((9, attached.manifest.size))
    for name, parameter in named.items():
        start = parameter.storage_offset()
        expected[:, start : start + parameter.numel()] = found[name].reshape(9, -1).numpy()
    loss = _example_loss(attached, CustomTask(_token_mean), data)
    for row in range(9):
        assert _close(_sum(attached, loss, np.array([row]), HUGE), expected[row])
    assert _close(_sum(attached, loss, np.arange(9), HUGE), expected.sum(0))


def _opacus_step(
    attached: AttachedAdapter, losses: Callable[[nn.Module], Tensor], rows: int, clip: float
) -> np.ndarray:
    """The flat gradient that opacus gives its optimizer, without noise."""
    attached.train_mode()
    trainable = [p for p in attached.module.parameters() if p.requires_grad]
    for layer in attached.module.modules():
        if any(p.requires_grad for p in layer.parameters(recurse=False)):
            layer.train()  # opacus' hooks look at no others
    sampling = GradSampleModule(attached.module, strict=False)
    optimizer = DPOptimizer(
        torch.optim.SGD(trainable, lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=clip,
        expected_batch_size=rows,
    )
    losses(sampling).backward()
    optimizer.step()
    flat = np.empty(attached.manifest.size)
    for parameter in trainable:
        start = parameter.storage_offset()
        flat[start : start + parameter.numel()] = parameter.grad.reshape(-1).numpy()
    sampling.to_standard_module()
    return flat


@pytest.mark.parametrize("clip", [0.3, 1.5, HUGE])
def test_a_users_module_takes_the_step_of_opacus(clip: float):
    rows = 25
    attached, data, task = _attach(_module()), _rows(rows), CustomTask()
    start = attached.read()
    result = _trainer(attached, clip=clip).train(start, data, _plan(rows))
    other = _attach(_module())
    batch = task.batch(data, np.arange(rows), CPU)
    theirs = _opacus_step(other, lambda module: task.loss(module, batch), rows, clip)
    assert _close(start - result.adapter, theirs)
    raw = [_norm(attached, task, data, row) for row in range(rows)]
    assert min(raw) < 1.5 < max(raw)


def _norm(attached: AttachedAdapter, task: Any, data: Any, row: int) -> float:
    loss = _example_loss(attached, task, data)
    return float(np.linalg.norm(_sum(attached, loss, np.array([row]), HUGE)))


def test_texts_take_the_step_of_opacus(fresh_classifier: Fresh, text_data: TokenizedTexts):
    lora = LoRA(rank=4, alpha=8.0, also_train=("classifier",))
    attached = attach_lora(fresh_classifier(LABELS), lora, seed=0)
    start = _start(attached)
    task = TextClassification(0)
    rows = np.unique(TEXT_ROWS)
    data = text_data.select(rows)
    settings = TorchSettings("sgd", record_privacy=RecordPrivacy(0.0, 0.4))
    result = TorchTrainer(attached, task, "ab" * 32, settings).train(start, data, _plan(len(rows)))
    attached.write(start)
    assert min(_norm(attached, task, data, row) for row in range(len(rows))) > 0.4
    batch = task.batch(data, np.arange(len(rows)), CPU)
    theirs = _opacus_step(attached, lambda module: task.loss(module, batch), len(rows), 0.4)
    assert _close(start - result.adapter, theirs)


# What becomes of the gradients.


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_without_noise_and_clip_it_is_ordinary_training_on_all_rows(optimizer: Any):
    attached, data = _attach(_module()), _rows(11)
    start = attached.read()
    settings: dict[str, Any] = {"optimizer": optimizer, "weight_decay": 0.1}
    private = _trainer(attached, **settings).train(start, data, _plan(64, steps=4, lr=0.1))
    batches = iter([np.arange(11)] * 4)
    plain = _trainer(attached, **settings, record_privacy=None)
    ordinary = plain.train(start, data, LocalPlan(batches, iter([0.1] * 4), seed=4))
    assert np.abs(private.adapter - ordinary.adapter).max() < 1e-6
    assert np.abs(private.adapter - start).max() > 0.01


@pytest.mark.parametrize("clip", [0.01, 0.5, 3.0])
def test_one_example_moves_the_sum_by_at_most_the_clip(clip: float):
    def weighted(module: nn.Module, batch: Any) -> Tensor:
        inputs, weight, target = batch
        return weight.mean() * functional.cross_entropy(module(inputs), target)

    attached, task = _attach(_module()), CustomTask(weighted)
    weights = [1.0] * 12 + [1000.0]  # the last one is an outlier
    data = Rows([(x, w, y) for (x, y), w in zip(_rows(13).rows, weights, strict=True)])
    loss = _example_loss(attached, task, data)
    everyone = _sum(attached, loss, np.arange(13), clip)
    for left_out in range(13):
        others = _sum(attached, loss, np.delete(np.arange(13), left_out), clip)
        norm = _norm(attached, task, data, left_out)
        moved = everyone - others
        assert np.linalg.norm(moved) == pytest.approx(min(norm, clip), rel=1e-5)
        # A shorter gradient keeps its direction: the whole vector is scaled, not its tensors.
        own = _sum(attached, loss, np.array([left_out]), HUGE)
        assert _close(moved, own * min(1.0, clip / norm))
    assert _norm(attached, task, data, 12) > 300


def test_the_sum_over_many_rows_is_that_of_single_rows():
    attached, data = _attach(_module()), _rows(150)
    sizes: list[int] = []

    def watching(module: nn.Module, batch: Any) -> Tensor:
        sizes.append(len(batch[1]))
        return functional.cross_entropy(module(batch[0]), batch[1])

    loss = _example_loss(attached, CustomTask(watching), data)
    singles = [_sum(attached, loss, np.array([row]), 0.7) for row in range(150)]
    for stop in (2, 64, 150):
        assert _close(_sum(attached, loss, np.arange(stop), 0.7), sum(singles[:stop]), 1e-12)
    assert not _sum(attached, loss, np.arange(0), 0.7).any()
    assert set(sizes) == {1}  # memory does not grow with the draw


def test_an_example_without_a_finite_gradient_counts_as_none():
    attached, data = _attach(_module()), _numbered(6)

    def broken(module: nn.Module, batch: Any) -> Tensor:
        factor = {4: math.nan, 5: math.inf}.get(int(batch[1]), 1.0)
        return factor * module(batch[0]).square().sum()

    loss = _example_loss(attached, CustomTask(broken), data)
    everyone = _sum(attached, loss, np.arange(6), 0.7)
    assert _close(everyone, _sum(attached, loss, np.arange(4), 0.7), 1e-12)
    result = _trainer(attached, broken, clip=0.7).train(attached.read(), data, _plan(6, lr=0.01))
    assert np.isfinite(result.adapter).all()


def test_bf16_gradients_are_summed_in_more_than_float32():
    attached, data = _attach(_module()), _rows(40)
    start = attached.read()
    full = start - _trainer(attached).train(start, data, _plan(40)).adapter
    half = start - _trainer(attached, precision="bf16").train(start, data, _plan(40)).adapter
    assert _close(half, full, 0.02)
    assert not _close(half, full, 1e-5)
    # Values that bfloat16 does not have: the low half of a float32 is in use.
    assert (half.view(np.uint32) & 0xFFFF).any()


# Noise, draws, and what nobody may know.


def _no_gradient(module: nn.Module, batch: Any) -> Tensor:
    return 0 * module(batch[0]).sum()


def test_noise_has_the_deviation_of_the_expected_batch():
    noise, clip, batch_size = 1.7, 0.6, 1
    attached = _attach(_module(60, 40))
    data = _rows(20, inputs=60)
    start = np.zeros(attached.manifest.size, np.float32)
    trainer = _trainer(attached, _no_gradient, noise, clip)
    # Most of these draws have none or several rows, and none is needed for the noise.
    steps = np.stack([trainer.train(start, data, _plan(batch_size)).adapter for _ in range(15)])
    normal = steps.astype(np.float64) / (noise * clip / batch_size)
    size = attached.manifest.size
    assert size > 300
    # 5.7 standard errors: of all 15 steps, a false alarm in less than one of 10 million runs.
    assert np.abs((normal**2).mean(1) - 1).max() < 5.7 * math.sqrt(2 / size)
    assert np.abs(normal.mean(1)).max() < 5.7 / math.sqrt(size)
    correlations = (normal @ normal.T / size)[np.triu_indices(15, 1)]
    assert np.abs(correlations).max() < 6.5 / math.sqrt(size)
    # And normal: within one, two and three deviations.
    for deviations in (1, 2, 3):
        share = math.erf(deviations / math.sqrt(2))
        error = math.sqrt(share * (1 - share) / normal.size)
        assert (np.abs(normal) < deviations).mean() == pytest.approx(share, abs=5.5 * error)


def test_noise_is_divided_by_as_many_examples_as_are_expected():
    # A larger batch and a number of rows that is smaller, for the same noise on the sum.
    attached = _attach(_module(60, 40))
    data = _rows(20, inputs=60)
    start = np.zeros(attached.manifest.size, np.float32)
    for batch_size, expected in ((8, 8), (20, 20), (500, 20)):
        trainer = _trainer(attached, _no_gradient, 2.0, 1.5)
        step = trainer.train(start, data, _plan(batch_size)).adapter.astype(np.float64)
        bound = 5.7 * math.sqrt(2 / step.size)
        assert ((step * expected / 3.0) ** 2).mean() == pytest.approx(1, abs=bound)


def test_the_sum_is_divided_by_the_expected_and_not_by_the_drawn_examples():
    attached, data = _attach(_module()), _numbered(30)
    drawn: list[int] = []

    def recording(module: nn.Module, batch: Any) -> Tensor:
        drawn.append(int(batch[1]))
        return module(torch.ones(1, 6)).sum()

    start = attached.read()
    loss = _example_loss(attached, CustomTask(recording), data)
    one = _sum(attached, loss, np.array([0]), HUGE)
    counts = []
    for _ in range(12):
        drawn.clear()
        result = _trainer(attached, recording).train(start, data, _plan(5))
        counts.append(len(drawn))
        assert np.abs((start - result.adapter) - len(drawn) * one / 5).max() < 1e-5
    assert len(set(counts)) > 1


def test_steps_draw_their_rows_independently():
    rows, batch_size, steps = 15, 12, 200
    attached, data = _attach(_module()), _numbered(rows)
    drawn: list[int] = []

    def recording(module: nn.Module, batch: Any) -> Tensor:
        drawn.append(int(batch[1]))
        return _no_gradient(module, batch)

    _trainer(attached, recording).train(attached.read(), data, _plan(batch_size, steps))
    total, rate = rows * steps, batch_size / rows
    deviation = math.sqrt(total * rate * (1 - rate))
    assert len(drawn) == pytest.approx(total * rate, abs=5.5 * deviation)
    per_row = np.bincount(drawn, minlength=rows)
    assert np.abs(per_row - steps * rate).max() < 6 * math.sqrt(steps * rate * (1 - rate))


def test_poisson_draws_are_binomial_and_independent():
    rows, rate, draws = 40, 0.15, 6000
    random = SecureRandom()
    included = np.zeros((draws, rows))
    for line in included:
        line[poisson_rows(rows, rate, random)] = 1
    sizes, variance = included.sum(1), rows * rate * (1 - rate)
    assert sizes.mean() == pytest.approx(rows * rate, abs=5.5 * math.sqrt(variance / draws))
    # Its excess kurtosis is so small that the variance has the spread of a normal one's, almost.
    assert sizes.var() == pytest.approx(variance, rel=6 * math.sqrt(2 / draws))
    scaled = (included - rate) / math.sqrt(rate * (1 - rate))
    pairs = (scaled.T @ scaled / math.sqrt(draws))[np.triu_indices(rows, 1)]
    assert np.abs(pairs).max() < 6.5
    following = scaled[1:].T @ scaled[:-1] / math.sqrt(draws)
    assert np.abs(following).max() < 6.5


def test_the_rate_is_that_of_the_batch_and_at_most_one():
    assert sampling_rate(8, 32) == 0.25
    assert sampling_rate(64, 32) == 1.0
    random = SecureRandom()
    assert all(len(poisson_rows(50, 1.0, random)) == 50 for _ in range(100))
    draw = poisson_rows(10_000, 0.5, random)
    assert draw.dtype == np.int64
    assert (np.diff(draw) > 0).all()


@pytest.mark.parametrize(
    ("noise", "batch_size", "dropout"),
    [(1.0, 20, 0.0), (0.0, 10, 0.0), (0.0, 20, 0.5)],
    ids=["noise", "draws", "dropout"],
)
def test_the_same_seed_gives_another_result(noise: float, batch_size: int, dropout: float):
    attached, data = _attach(_module(), dropout), _rows(20)
    start = attached.read()

    def train() -> np.ndarray:
        torch.manual_seed(0)
        np.random.seed(0)  # what a careless sampler would use
        trainer = _trainer(attached, noise=noise, clip=1.0)
        return trainer.train(start, data, _plan(batch_size, steps=3)).adapter

    first, second = train(), train()
    assert np.abs(first - second).max() > 1e-4


def test_noise_owes_nothing_to_torchs_generator():
    attached, data = _attach(_module()), _rows(5)
    start = attached.read()

    def seeding(module: nn.Module, batch: Any) -> Tensor:
        torch.manual_seed(0)
        return _no_gradient(module, batch)

    trainer = _trainer(attached, seeding, noise=1.0, clip=1.0)
    first = trainer.train(start, data, _plan(5)).adapter
    second = trainer.train(start, data, _plan(5)).adapter
    assert np.median(np.abs(first - second)) > 0.01


def test_dropout_of_an_example_does_not_depend_on_those_before_it():
    attached = _attach(_module(), dropout=0.5)
    attached.train_mode()
    states: list[bytes] = []

    def loss(row: int) -> Tensor:
        states.append(torch.get_rng_state().numpy().tobytes())
        out: Tensor = attached.module(torch.ones(1, 6)).sum()
        torch.manual_seed(row)  # whatever one example does to the generator ends with it
        return out

    random, privacy = SecureRandom(), RecordPrivacy(0.0, 1.0)
    gradient = example_gradient(attached, loss, random)
    for _ in range(2):
        private_gradient(gradient, attached.manifest.size, 4, 4, privacy, random)
    assert len(set(states)) == 8


# What is refused, and what does not come out.


def test_the_loss_stays_at_the_client():
    attached = _attach(_module())
    assert _trainer(attached).train(attached.read(), _rows(5), _plan(5)).loss is None


def test_an_adapter_that_diverges_is_an_error():
    attached = _attach(_module())
    trainer = _trainer(attached, noise=1.0, clip=1.0)
    with pytest.raises(TrainingError, match=r"finite; lower train.lr$"):
        trainer.train(attached.read(), _rows(5), _plan(5, lr=math.inf))


def test_a_plan_without_batch_size_is_refused():
    attached = _attach(_module())
    plan = LocalPlan(iter(()), iter([1.0]), seed=0)
    with pytest.raises(ValueError, match="batch size"):
        _trainer(attached).train(attached.read(), _rows(5), plan)


def test_clipping_twice_is_refused():
    with pytest.raises(ConfigError, match="max-grad-norm"):
        TorchSettings(max_grad_norm=1.0, record_privacy=RecordPrivacy(1.0, 1.0))


@pytest.mark.parametrize(
    ("noise", "clip"),
    [(-0.1, 1.0), (math.nan, 1.0), (math.inf, 1.0), (1.0, 0.0), (1.0, -1.0), (1.0, math.inf)],
)
def test_noise_and_clip_have_ranges(noise: float, clip: float):
    with pytest.raises(ConfigError, match="must be"):
        RecordPrivacy(noise, clip)


def _with_norm(norm: nn.Module, also_train: tuple[str, ...]) -> AttachedAdapter:
    module = nn.Sequential()
    module.add_module("inner", nn.Linear(6, 8))
    module.add_module("block", nn.Sequential(norm, nn.Linear(8, LABELS)))
    lora = LoRA(rank=2, targets=("inner",), also_train=also_train)
    return attach_lora(module, lora, seed=0)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_layers_that_mix_a_batch_are_refused(layer: type[nn.Module]):
    attached = _with_norm(layer(8, track_running_stats=False), ("block",))
    with pytest.raises(ConfigError, match=r"BatchNorm.*block.*GroupNorm or LayerNorm"):
        _trainer(attached)
    _trainer(attached, record_privacy=None)  # without privacy it is the user's own affair


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_layers_that_remember_examples_are_refused(layer: type[nn.Module]):
    module = nn.Sequential()
    module.add_module("modules_to_save", layer(8, affine=True, track_running_stats=True))
    attached = AttachedAdapter(module, dict(module.named_parameters()), None)
    with pytest.raises(ConfigError, match=r"Norm.*modules_to_save"):
        _trainer(attached)


@pytest.mark.parametrize(
    ("norm", "also_train"),
    [(nn.BatchNorm1d(8), ("block.1",)), (nn.LayerNorm(8), ("block",))],
    ids=["frozen", "no-batch"],
)
def test_other_normalizations_train(norm: nn.Module, also_train: tuple[str, ...]):
    attached = _with_norm(norm, also_train)
    start = attached.read()
    buffers = {name: b.clone() for name, b in attached.module.named_buffers()}
    result = _trainer(attached, noise=0.1, clip=1.0).train(start, _rows(6), _plan(6))
    assert np.abs(result.adapter - start).max() > 1e-3
    assert all(torch.equal(b, buffers[name]) for name, b in attached.module.named_buffers())
