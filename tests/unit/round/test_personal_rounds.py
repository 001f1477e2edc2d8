"""Rounds of an adapter with a private part: what is learned, what is sent, what a kill does."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from unit.round.masked_run import CLIENT_UNIT, MASKED, RECORD_UNIT, MaskedFederation

from fedtune.config import OPEN_POLICY
from fedtune.errors import BudgetExceeded, ProtocolViolation
from fedtune.round.local import record_privacy
from fedtune.round.site import Answer, PrivatePart
from fedtune.round.terms import client_release
from fedtune.secagg.client import Stage
from fedtune.train.batches import client_rng, learning_rate, plan_batches
from fedtune.train.task import CustomTask
from fedtune.train.torch_trainer import TorchSettings, TorchTrainer

HEAD = 'adapter.private=["head"]'
SIZES = (7, 12, 5)
FOUR = (*SIZES, 9)
NAMES = ("inner.lora_A", "inner.lora_B", "head.weight", "head.bias")


def _privates(fed: MaskedFederation, round_number: int | None = None) -> dict[str, np.ndarray]:
    """What each client's next round begins with."""
    number = fed.federation.round + 1 if round_number is None else round_number
    found = {}
    for name in fed.names:
        own = fed.membership(name).store.private_part(name, fed.run_id, number)
        assert own is not None, name
        found[name] = own
    return found


def _tensors(values: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    short = {name.removeprefix("base_model.model."): value for name, value in values.items()}
    return {
        name: torch.from_numpy(short[name if name in short else f"{name}.weight"].copy()).double()
        for name in NAMES
    }


# --------------------------------------------------------------------------------------- learning
def _train_by_hand(fed: MaskedFederation, values: dict[str, torch.Tensor], name: str, number: int):
    """SGD on all four tensors at once, in float64: h = (W + s·B·A)·x + b, then the head."""
    config, machine = fed.config, fed.machines[name]
    inner = fed.small.attached.module.get_submodule("base_model.model.inner.base_layer")
    weight, bias = inner.weight.detach().double(), inner.bias.detach().double()
    rows = machine.local.train_data
    rng = client_rng(config.seed, number, name)
    train, rounds = config.train, config.rounds.count
    batches = plan_batches(rows.lengths, train.steps, train.batch_size, rng)
    lr = learning_rate(train.schedule, train.lr, train.final_lr_fraction, number - 1, rounds)
    here = {key: value.clone().requires_grad_() for key, value in values.items()}
    for batch in batches:
        inputs = torch.stack([rows.rows[int(row)][0] for row in batch]).double()
        labels = torch.tensor([rows.rows[int(row)][1] for row in batch])
        scale = 4.0 / 2  # alpha / rank
        hidden = inputs @ (weight + scale * here["inner.lora_B"] @ here["inner.lora_A"]).T + bias
        logits = hidden @ here["head.weight"].T + here["head.bias"]
        gradients = torch.autograd.grad(functional.cross_entropy(logits, labels), here.values())
        for key, gradient in zip(list(here), gradients, strict=True):
            here[key] = (here[key] - lr * gradient).detach().requires_grad_()
    return {key: value.detach() for key, value in here.items()}


def test_it_is_fedsim_by_hand(masked_federation):
    """Pillutla et al. 2022, algorithm FedSim: the shared tensors' mean, each client's own head."""
    fed = masked_federation(HEAD, "train.optimizer=sgd", "train.lr=0.5", base=(), sizes=SIZES)
    parts = fed.parts
    start = _tensors(parts.whole.split(parts.join(fed.start, parts.private_of(parts.start))))
    shared = {name: start[name] for name in NAMES[:2]}
    heads = {name: {key: start[key] for key in NAMES[2:]} for name in fed.names}
    for number in (1, 2, 3):
        gone = {"client-1": "advertise"} if number == 2 else {}
        total = {key: torch.zeros_like(value) for key, value in shared.items()}
        there = [name for name in fed.names if name not in gone]
        for name in there:
            trained = _train_by_hand(fed, {**shared, **heads[name]}, name, number)
            heads[name] = {key: trained[key] for key in NAMES[2:]}
            examples = fed.machines[name].local.train_examples
            for key in total:
                total[key] += examples * (trained[key] - shared[key])
        counted = sum(fed.machines[name].local.train_examples for name in there)
        shared = {key: value + total[key] / counted for key, value in shared.items()}
        fed.round(gone=gone)
    moved = fed.federation.adapter - fed.start
    assert np.abs(moved).max() > 0.1
    for name, own in _privates(fed).items():
        found = _tensors(parts.whole.split(parts.join(fed.federation.adapter, own)))
        for key, expected in {**shared, **heads[name]}.items():
            np.testing.assert_allclose(found[key], expected, atol=1e-6, err_msg=f"{name} {key}")


def test_a_client_is_evaluated_with_its_own_part(masked_federation):
    fed = masked_federation(HEAD, "train.lr=0.5", base=(), sizes=SIZES)
    fed.round()
    scores = set()
    for name, own in _privates(fed).items():
        local = fed.machines[name].local
        whole = fed.parts.join(fed.federation.adapter, own)
        found = local.evaluate(fed.federation.adapter, fed.run_id, 1)
        assert found.loss_sum == fed.small.trainer.evaluate(whole, local.test_data).loss_sum
        # Before its first round it has the one that all began with.
        whole = fed.parts.join(fed.start, fed.parts.private_of(fed.parts.start))
        found = local.evaluate(fed.start, fed.run_id, 0)
        assert found.loss_sum == fed.small.trainer.evaluate(whole, local.test_data).loss_sum
        scores.add(own.tobytes())
    assert len(scores) == len(fed.names)


# --------------------------------------------------------------------------------- what is sent
@pytest.mark.parametrize("more", [(), ("aggregate.rule=fisher",)])
@pytest.mark.parametrize("base", [(), MASKED])
def test_nothing_private_is_sent_or_logged(masked_federation, base, more, caplog):
    caplog.set_level(logging.DEBUG)
    fed = masked_federation(HEAD, *more, base=base, sizes=SIZES)
    assert [tensor.name for tensor in fed.federation.manifest.tensors] == [
        f"base_model.model.inner.lora_{matrix}.weight" for matrix in "AB"
    ]
    sent: list[bytes] = []
    for _ in range(2):
        fed.round(
            before=lambda _name, _stage, request: sent.append(request),
            tamper=lambda _name, _stage, reply: sent.append(reply) or reply,
        )
    values = fed.config.values_sent(fed.manifest.size)
    assert values == fed.manifest.size * (2 if more else 1)
    messages = b"".join(sent)
    assert fed.start[:4].tobytes() in messages  # what is shared is found this way
    text = caplog.text
    for name, own in _privates(fed).items():
        first = fed.membership(name).store.private_part(name, fed.run_id, 2)
        start = fed.parts.private_of(fed.parts.start)
        for vector in (own, first, own - first, first - start, start):
            for place in range(0, len(vector) - 1):
                pair = vector[place : place + 2]
                assert pair.tobytes() not in messages
                assert pair.astype("<f8").tobytes() not in messages
                assert str(pair[0]) not in text
                assert repr(float(pair[0])) not in text


def test_what_is_remembered_does_not_show(masked_federation):
    fed = masked_federation(HEAD, base=(), sizes=SIZES)
    local = fed.machines["client-0"].local
    result = local.train(fed.start, fed.run_id, 1)
    assert result.private is not None
    for shown in (repr(result), repr(result.private)):
        assert "array" not in shown
        assert str(result.private.after[0]) not in shown


# ------------------------------------------------------------------------------------------ kills
@pytest.mark.parametrize("base", [(), MASKED])
def test_a_round_that_is_repeated_begins_where_it_did(masked_federation, base):
    """The server is killed with all answers in, and the sites too; twice, in each round."""
    fed = masked_federation(HEAD, base=base, sizes=SIZES, folder="killed")
    whole = masked_federation(HEAD, base=base, sizes=SIZES, folder="whole")
    for _ in range(2):
        whole.round()
        for _ in range(2):
            fed.open_until("train", after=True)
            fed.restart_sites()
            fed.restart_server()
        fed.round()
        assert fed.adapter == whole.adapter
        theirs = _privates(whole)
        for name, own in _privates(fed).items():
            assert own.tobytes() == theirs[name].tobytes()


def _killed_at(fed: MaskedFederation, statement: int, request: bytes) -> int:
    """The site `client-0` trains in a process that ends by SIGKILL at its n-th SQL statement."""
    fed.stop_sites()
    pid = os.fork()
    if pid == 0:
        try:
            fed.restart_sites()
            seen = iter(range(1, statement))
            database: sqlite3.Connection = fed.machines["client-0"]._membership.store._db
            database.set_trace_callback(
                lambda _sql: next(seen, 0) or os.kill(os.getpid(), signal.SIGKILL)
            )
            fed.answer("client-0", "train", request)
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


@pytest.mark.parametrize("base", [(), MASKED])
def test_a_site_killed_at_any_statement_of_training_learns_the_same(masked_federation, base):
    whole = masked_federation(HEAD, base=base, sizes=SIZES, folder="whole")
    whole.round()
    whole.round()
    theirs, statement, died = _privates(whole), 0, True
    while died:
        statement += 1
        fed = masked_federation(HEAD, base=base, sizes=SIZES, folder=f"{statement}")
        fed.round()
        opened, exchange = fed.open_until("train")
        died = os.WIFSIGNALED(_killed_at(fed, statement, exchange.requests["client-0"]))
        fed.restart_sites()
        fed.finish(opened, exchange)
        assert fed.adapter == whole.adapter, statement
        for name, own in _privates(fed).items():
            assert own.tobytes() == theirs[name].tobytes(), (statement, name)
    assert statement > 4  # the private part is read; begin, write, commit


def test_a_private_part_and_what_it_cost_are_kept_together(masked_federation):
    """Later updates depend on it: one that was not charged for must not be there."""
    more = ("train.steps=2", "privacy.epsilon=50")
    fed = masked_federation(HEAD, *more, base=(*MASKED, *RECORD_UNIT), sizes=SIZES)
    fed.open_until("train")
    store = fed.membership("client-0").store
    state = fed.kept("client-0").session
    own = PrivatePart(fed.run_id, 1, np.zeros(3, np.float32), np.ones(3, np.float32))
    charge = fed.membership("client-0").charge(fed.machines["client-0"].local, fed.run_id, 1)
    assert charge is not None
    masked = replace(state, stage=Stage.MASKED)
    answer = Answer(b"q" * 32, b"a")
    with pytest.raises(BudgetExceeded):
        store.advance(state, masked, answer, replace(charge, run_budget=0.0), own)
    assert store.private_part("client-0", fed.run_id, 2) is None
    store.advance(state, masked, answer, charge, own)
    kept = store.private_part("client-0", fed.run_id, 2)
    assert kept is not None
    assert kept.tolist() == [1, 1, 1]


def test_a_site_whose_training_fails_keeps_its_part(masked_federation):
    silent = OPEN_POLICY.model_copy(update={"report_failures": False})
    fed = masked_federation(HEAD, sizes=SIZES, policy=silent)
    fed.round()
    before = _privates(fed)
    local = fed.machines["client-1"].local

    class Fails:
        def train(self, *_arguments: Any) -> Any:
            raise RuntimeError("no")

    local._trainer = Fails()
    fed.round()
    after = _privates(fed)
    same = [name for name in fed.names if after[name].tobytes() == before[name].tobytes()]
    assert same == ["client-1"]


def test_what_a_round_began_with_is_known_for_the_last_one_only(masked_federation):
    fed = masked_federation(HEAD, base=(), sizes=SIZES)
    fed.round()
    fed.round()
    store = fed.membership("client-0").store
    assert store.private_part("client-0", "another run", 1) is None
    again = store.private_part("client-0", fed.run_id, 2)
    later = store.private_part("client-0", fed.run_id, 9)
    assert again is not None
    assert later is not None
    assert not np.array_equal(again, later)
    with pytest.raises(ProtocolViolation, match="round 1 after round 2"):
        store.private_part("client-0", fed.run_id, 1)


def test_with_noise_for_each_record_both_parts_have_it(masked_federation):
    """A step without examples moves by noise alone: it must be in the private tensors too."""
    noise = ("privacy.unit=record", "privacy.noise-multiplier=5.0", "train.optimizer=sgd")
    fed = masked_federation(HEAD, *noise, base=MASKED)
    local = fed.machines["client-0"].local
    settings = TorchSettings("sgd", record_privacy=record_privacy(fed.config, 7))
    local._trainer = TorchTrainer(fed.small.attached, CustomTask(), "ab" * 32, settings)
    drawn = [local.train(fed.start, fed.run_id, 1) for _ in range(2)]
    assert not np.array_equal(drawn[0].private.after, drawn[1].private.after)
    assert (drawn[0].private.after != drawn[0].private.before).all()


def test_the_noise_that_hides_a_client_is_in_what_is_sent_alone(masked_federation):
    noisy = masked_federation(HEAD, base=CLIENT_UNIT, sizes=FOUR, folder="noisy")
    plain = masked_federation(HEAD, base=MASKED, sizes=FOUR, folder="plain")
    assert noisy.round().clients == plain.round().clients
    moved = noisy.federation.adapter - noisy.start
    size = noisy.manifest.size
    assert np.linalg.norm(moved - (plain.federation.adapter - plain.start)) > 0.05
    # Of as many values as travel, and no more.
    assert noisy.journal.ledger().releases == (client_release(noisy.config, size, 1),)
    theirs = _privates(plain)
    for name, own in _privates(noisy).items():
        assert own.tobytes() == theirs[name].tobytes()
