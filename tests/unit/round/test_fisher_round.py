"""Rounds whose updates are merged by Fisher information, with masks and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from unit.round.masked_run import MASKED, UPDATE

from fedtune.config import OPEN_POLICY
from fedtune.errors import MalformedMessage, TrainingError
from fedtune.round.federation import Federation
from fedtune.round.journal import Journal
from fedtune.round.server import GlobalState
from fedtune.train.batches import client_rng, plan_batches
from fedtune.train.trainer import LocalPlan
from fedtune.wire import codec

FISHER = "aggregate.rule=fisher"
FINE = ("update.clip=2.0", "update.bits=30")  # a client of 4 rows weighs 4 / 1000


def _trained(fed: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What each client trains in round 1, and its Fisher information, without any message."""
    adapters, fishers = [], []
    for machine in fed.machines.values():
        rows, rng = machine._local.train_data, client_rng(0, 1, machine.name)
        batches = plan_batches(rows.lengths, 3, 4, rng)
        plan = LocalPlan(batches, iter([0.05] * 3), 0, 4, True)
        result = fed.small.trainer.train(fed.start, rows, plan)
        adapters.append(result.adapter.astype(np.float64))
        fishers.append(result.fisher.astype(np.float64))
    return adapters, fishers


def _merged(fed: Any, damping: float, names: list[str]) -> np.ndarray:
    """By the paper's formula; no value is 100 times the mean here."""
    above, below = np.zeros(fed.start.size), np.zeros(fed.start.size)
    adapters, fishers = _trained(fed)
    for name, count, adapter, fisher in zip(
        fed.names, fed.small.examples, adapters, fishers, strict=True
    ):
        assert fisher.min() > 0
        assert fisher.max() < 100 * fisher.mean()
        weight = count * ((1 - damping) * fisher / np.sqrt((fisher**2).mean()) + damping)
        if name in names:
            above, below = above + weight * adapter, below + weight
    return np.asarray(above / below)


def test_masks_change_nothing(masked_federation: Any) -> None:
    masked = masked_federation(FISHER, folder="masked")
    plain = masked_federation(FISHER, base=UPDATE, folder="plain")
    for number in range(3):
        gone = {"client-2": "train"} if number == 1 else {}
        one, other = masked.round(gone=gone), plain.round(gone=gone)
        assert masked.adapter == plain.adapter
        assert one.clients == other.clients
        assert len(one.clients) == (5 if gone else 6)
    average = masked_federation(folder="average")
    average.round()
    assert np.abs(masked.federation.adapter - masked.start).max() > 0.02
    assert average.adapter != masked.adapter


@pytest.mark.parametrize("base", [(), FINE, (*FINE, "secagg.enabled=true")])
@pytest.mark.parametrize("damping", [0.1, 0.02])
def test_the_result_is_by_the_papers_formula(
    masked_federation: Any, base: tuple[str, ...], damping: float
) -> None:
    """In the clear as floats and as integers, and under masks."""
    fed = masked_federation(FISHER, f"aggregate.fisher-damping={damping}", base=base)
    expected = _merged(fed, damping, fed.names)
    fed.round()
    assert fed.federation.adapter == pytest.approx(expected, abs=1e-4)
    adapters, _ = _trained(fed)
    average = np.average(adapters, axis=0, weights=fed.small.examples)
    assert np.abs(average - expected).max() > 0.01


def test_who_fails_says_nothing(masked_federation: Any) -> None:
    """Under its policy it sends zeros, and nobody learns of it; the others are merged alone."""
    fed = masked_federation(
        FISHER,
        base=(*FINE, "secagg.enabled=true"),
        policy=OPEN_POLICY.model_copy(update={"report_failures": False}),
    )

    def fail(*_: Any) -> None:
        raise TrainingError("broken")

    fed.machines["client-3"]._local.train = fail
    expected = _merged(fed, 0.1, [name for name in fed.names if name != "client-3"])
    record = fed.round()
    assert record.clients == tuple(fed.names)
    assert fed.federation.adapter == pytest.approx(expected, abs=1e-4)


def test_a_trainer_that_gives_none_is_told(small_federation: Any) -> None:
    small = small_federation(FISHER)
    local = small.machines[0].local

    class Without:
        def train(self, *arguments: Any) -> Any:
            result = small.trainer.train(*arguments)
            return type(result)(result.adapter, result.loss, result.seconds)

    local._trainer = Without()
    start = np.zeros(local.manifest.size, np.float32)
    with pytest.raises(TrainingError, match="no Fisher information"):
        local.train(start, "run", 1)


@pytest.mark.parametrize("integers", [(), UPDATE])
def test_only_both_halves_are_an_update(
    small_federation: Any, tmp_path: Path, integers: tuple[str, ...]
) -> None:
    small = small_federation(FISHER, *integers)
    start = np.full(small.attached.manifest.size, 0.1, np.float32)
    journal = Journal.create(tmp_path / "j.db", {"run_id": "run"}, GlobalState(start, {}))
    federation = Federation(small.config, small.attached.manifest, "ab" * 32, journal)
    for machine in small.machines:
        federation.admit(machine.hello(codec.encode_hello_request("run")))
    opened, exchange = federation.open_round()
    machine = small.machines[0]
    answer = machine.train(exchange.requests[machine.name])
    reply = codec.decode_train_reply(answer, opened.updates.encoded_bytes)
    half = codec.TrainReply(
        opened.context, reply.update[: len(reply.update) // 2], 7, reply.loss, 0.0
    )
    with pytest.raises(MalformedMessage):
        opened.receive(machine.name, codec.encode_train_reply(half))
    opened.receive(machine.name, answer)
    if not integers:
        assert len(reply.update) == 2 * 4 * start.size
    journal.close()


def test_a_policy_may_refuse_it_by_name(masked_federation: Any) -> None:
    policy = OPEN_POLICY.model_copy(update={"rules": ("fedavg",)})
    with pytest.raises(Exception, match="the rule fisher"):
        masked_federation(FISHER, base=MASKED, policy=policy)
    allowed = OPEN_POLICY.model_copy(update={"rules": ("fisher",)})
    fed = masked_federation(FISHER, base=MASKED, policy=allowed, folder="allowed")
    assert len(fed.round().clients) == 6
