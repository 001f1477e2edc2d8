"""Robust combinations, against other implementations and worked examples."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedtune.aggregate.robust import coordinate_median, krum
from fedtune.config import parse_config
from fedtune.errors import ConfigError


def _krum_by_the_paper(updates: np.ndarray) -> int:
    clients = len(updates)
    wrong = (clients - 3) // 2
    scores = []
    for i in range(clients):
        others = [float(((updates[i] - updates[j]) ** 2).sum()) for j in range(clients) if j != i]
        scores.append(sum(sorted(others)[: clients - wrong - 2]))
    return scores.index(min(scores))


@pytest.mark.parametrize("clients", [3, 4, 5, 8, 11])
def test_krum_is_that_of_the_paper(clients):
    for seed in range(20):
        updates = np.random.default_rng([seed, clients]).normal(size=(clients, 7))
        assert (krum(updates) == updates[_krum_by_the_paper(updates)]).all()


@pytest.mark.parametrize("combine", [krum, coordinate_median])
def test_a_minority_of_wrong_updates_does_not_get_through(combine):
    rng = np.random.default_rng(3)
    honest = 1 + 0.1 * rng.normal(size=(7, 50))
    for liar in (1e6, -1e6):
        result = combine(np.concatenate([honest, np.full((2, 50), liar)]))
        assert np.abs(result - 1).max() < 0.5


def test_the_order_of_clients_does_not_matter():
    updates = np.random.default_rng(5).normal(size=(5, 3))
    results = {
        (krum(updates[list(order)]).tobytes(), coordinate_median(updates[list(order)]).tobytes())
        for order in itertools.permutations(range(5))
    }
    assert len(results) == 1


@pytest.mark.parametrize("rule", ["median", "krum"])
def test_no_rule_looks_at_single_updates_under_masks(rule):
    masked = ("secagg.enabled=true", "update.bits=16", "update.clip=1.0")
    with pytest.raises(ConfigError, match=f"{rule} needs to see single updates.*use fedavg"):
        parse_config("", "test", [f"aggregate.rule={rule}", "aggregate.weighting=uniform", *masked])
    with pytest.raises(ConfigError, match="uniform"):
        parse_config("", "test", [f"aggregate.rule={rule}"])


@pytest.mark.parametrize("rule", ["median", "krum"])
def test_a_federation_follows_the_rule(small_federation, tmp_path, rule):
    from fedtune.round.federation import Federation
    from fedtune.round.journal import Journal
    from fedtune.round.server import GlobalState
    from fedtune.wire import codec

    small = small_federation(
        f"aggregate.rule={rule}", "aggregate.weighting=uniform", sizes=(3, 4, 5, 6, 7)
    )
    start = np.zeros(small.attached.manifest.size, np.float32)
    journal = Journal.create(tmp_path / "j.db", {"run_id": "run"}, GlobalState(start, {}))
    federation = Federation(small.config, small.attached.manifest, "ab" * 32, journal)
    for machine in small.machines:
        federation.admit(machine.hello(codec.encode_hello_request("run")))
    opened, exchange = federation.open_round()
    updates = np.random.default_rng(1).normal(size=(5, len(start))).astype(np.float32)
    for place in (4, 0, 2, 1, 3):
        reply = codec.TrainReply(opened.context, updates[place].tobytes(), 3 + place, 0.0, 0.0)
        opened.receive(f"client-{place}", codec.encode_train_reply(reply))
    closed = federation.close_round(opened)
    expected = {
        "median": np.median(updates.astype(np.float64), axis=0),
        "krum": updates[_krum_by_the_paper(updates.astype(np.float64))],
    }[rule]
    assert closed == pytest.approx(expected, abs=1e-6)
    assert list(exchange.requests) == [f"client-{place}" for place in range(5)]
    journal.close()
