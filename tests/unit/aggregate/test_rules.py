"""Rules against torch, Flower, closed forms and a computation by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedtune.aggregate import AdamRule, MomentumRule, Rule
from fedtune.config import Aggregate, Config
from fedtune.round.federation import make_rule

RNG = np.random.default_rng(8)
UPDATES = RNG.normal(size=(5, 40)).astype(np.float32)
WEIGHTS = np.array([3, 1, 40, 7, 9], np.float64)
START = RNG.normal(size=40).astype(np.float32)


def _run(rule: Rule, start: np.ndarray, means: np.ndarray, weight: float) -> list[np.ndarray]:
    """The adapters of one round after another, from the mean update of each."""
    state, adapter, adapters = rule.init(start.size), start, []
    for mean in means:
        state, adapter = rule.apply(state, adapter, mean.astype(np.float64) * weight, weight)
        adapters.append(adapter)
    return adapters


def test_rate_1_momentum_0_is_the_weighted_mean_of_what_clients_trained():
    total = (WEIGHTS[:, None] * UPDATES.astype(np.float64)).sum(0)
    state, adapter = MomentumRule().apply({}, START, total, WEIGHTS.sum())
    # FedAvg as it is usually written: the weighted mean of the clients' own weights.
    expected = np.average(START + UPDATES.astype(np.float64), axis=0, weights=WEIGHTS)
    assert np.abs(adapter - expected).max() < 1e-6
    assert adapter.dtype == np.float32
    assert state == {}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_momentum_is_torch_sgd_on_minus_the_mean_update(momentum):
    parameter = torch.nn.Parameter(torch.from_numpy(START.copy()).double())
    optimizer = torch.optim.SGD([parameter], lr=0.7, momentum=momentum)
    ours = _run(MomentumRule(0.7, momentum), START, UPDATES, weight=12.0)
    for adapter, mean in zip(ours, UPDATES, strict=True):
        parameter.grad = -torch.from_numpy(mean).double()
        optimizer.step()
        assert np.abs(adapter - parameter.detach().numpy()).max() < 1e-5


def test_adam_by_hand():
    # Reddi et al., algorithm 2, with η=1, β₁=½, β₂=¾, τ=½ (so v₀=¼), Δ₁=2, Δ₂=-1:
    # m₁=1, v₁=3/16+1=19/16, θ₁=1/(√(19/16)+½) = 4/(√19+2)
    # m₂=½-½=0, v₂=57/64+16/64=73/64, θ₂=θ₁; Δ₃=1: m₃=½, v₃=219/256+64/256=283/256,
    # θ₃=θ₁+½/(√283/16+½) = θ₁ + 8/(√283+8)
    rule = AdamRule(lr=1.0, beta1=0.5, beta2=0.75, tau=0.5)
    means = np.array([[2.0], [-1.0], [1.0]])
    adapters = [a.item() for a in _run(rule, np.zeros(1, np.float32), means, weight=4.0)]
    first = 4 / (19**0.5 + 2)
    third = first + 8 / (283**0.5 + 8)
    assert adapters == pytest.approx([first, first, third], rel=1e-6)


def test_adam_starts_from_the_second_moment_of_the_paper():
    state = AdamRule(tau=0.02).init(3)
    assert state["first"].tolist() == [0, 0, 0]
    assert state["second"] == pytest.approx([4e-4] * 3, rel=1e-12)


def test_adam_is_flowers_fedadam_but_for_its_bias_correction():
    # Flower starts from v₀=0 and multiplies its rate by √(1-β₂ᵗ⁺¹)/(1-β₁ᵗ⁺¹).
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedAdam

    from fedtune.flower.internals import SERVER_NODE, become_task

    become_task(1, SERVER_NODE)
    eta, beta1, beta2, tau = 0.3, 0.9, 0.99, 1e-2
    flower = FedAdam(eta=eta, beta_1=beta1, beta_2=beta2, tau=tau)
    theirs, ours = START.astype(np.float64), START
    state = {"first": np.zeros(40), "second": np.zeros(40)}

    def trained(update: np.ndarray, weight: float) -> Message:
        record = ArrayRecord({"x": Array(theirs + update)})
        metrics = MetricRecord({"num-examples": weight})
        content = RecordDict({"arrays": record, "metrics": metrics})
        return Message(content, dst_node_id=SERVER_NODE, message_type="train")

    for number in (1, 2, 3):
        updates = RNG.normal(size=(3, 40))
        flower.current_arrays = {"x": theirs}  # what `configure_train` notes
        replies = [trained(u, w) for u, w in zip(updates, WEIGHTS[:3], strict=True)]
        arrays, _ = flower.aggregate_train(number, replies)
        assert arrays is not None
        theirs = arrays["x"].numpy()
        corrected = eta * np.sqrt(1 - beta2 ** (number + 1)) / (1 - beta1 ** (number + 1))
        total = WEIGHTS[:3] @ updates
        rule = AdamRule(corrected, beta1, beta2, tau)
        state, ours = rule.apply(state, ours, total, WEIGHTS[:3].sum())
        assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.parametrize("rule", [MomentumRule(0.5, 0.9), AdamRule()])
def test_apply_leaves_its_arguments_as_they_were(rule):
    state = rule.init(40)
    before = {name: value.copy() for name, value in state.items()}
    total, start = UPDATES[0].astype(np.float64), START.copy()
    rule.apply(state, start, total, 2.0)
    assert all(np.array_equal(state[name], before[name]) for name in before)
    assert np.array_equal(start, START)
    assert np.array_equal(total, UPDATES[0].astype(np.float64))


def test_the_configuration_names_the_rule():
    sgd = Aggregate(server_lr=0.5, server_momentum=0.25)
    assert make_rule(Config(aggregate=sgd), 40) == MomentumRule(lr=0.5, momentum=0.25)
    adam = Aggregate(
        server_optimizer="adam",
        server_lr=0.5,
        server_momentum=0.25,
        server_beta2=0.75,
        server_epsilon=0.125,
    )
    assert make_rule(Config(aggregate=adam), 40) == AdamRule(
        lr=0.5, beta1=0.25, beta2=0.75, tau=0.125
    )
