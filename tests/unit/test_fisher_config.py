"""What Fisher merging cannot be combined with is refused, by name, and how much it sends."""

from __future__ import annotations

import pytest

from fedtune.config import Config, parse_config
from fedtune.deploy.doctor.traffic import packed_update, predict_traffic, site_disk
from fedtune.errors import ConfigError

FISHER = ("aggregate.rule=fisher",)
INTEGERS = ("update.clip=1.0", "update.bits=16")
CLIENT = (*INTEGERS, "secagg.enabled=true", "aggregate.weighting=uniform", "privacy.unit=client")
SIZE = 81_813
NAMES = tuple(f"clinic-{place}" for place in range(8))


def _parse(*overrides: str) -> Config:
    return parse_config("", "test", overrides)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["train.method=forward-only", "train.optimizer=sgd"], "squared gradients.*forward-only"),
        (["privacy.unit=record", "privacy.epsilon=3.0"], r"privacy\.unit = record"),
        ([*CLIENT, "privacy.noise-multiplier=1.0"], r"privacy\.unit = client"),
    ],
)
def test_what_it_cannot_be_combined_with_is_refused(overrides: list[str], named: str) -> None:
    assert _parse(*overrides).aggregate.rule == "fedavg"
    with pytest.raises(ConfigError, match=f"fisher.*{named}"):
        _parse(*FISHER, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        INTEGERS,
        (*INTEGERS, "secagg.enabled=true"),
        ("update.compress=float16",),
        ("aggregate.server-optimizer=adam", "aggregate.server-lr=0.01"),
        ("aggregate.weighting=uniform",),
        ("train.max-grad-norm=1.0",),
    ],
)
def test_what_it_can_be_combined_with(overrides: tuple[str, ...]) -> None:
    config = _parse(*FISHER, "aggregate.fisher-damping=0.3", *overrides)
    assert parse_config(config.to_toml(), "test") == config


@pytest.mark.parametrize("rule", ["fedavg", "median", "krum"])
def test_its_key_is_refused_where_it_means_nothing(rule: str) -> None:
    uniform = (f"aggregate.rule={rule}", "aggregate.weighting=uniform")
    assert _parse(*uniform).aggregate.fisher_damping == 0.1
    with pytest.raises(ConfigError, match=r"fisher-damping is for aggregate\.rule = fisher"):
        _parse(*uniform, "aggregate.fisher-damping=0.3")


@pytest.mark.parametrize("value", ["0.0", "1.01", "-0.1", "nan"])
def test_the_damping_is_a_share(value: str) -> None:
    with pytest.raises(ConfigError, match="fisher-damping"):
        _parse(*FISHER, f"aggregate.fisher-damping={value}")


def test_twice_as_many_values_are_sent_as_are_trained() -> None:
    config = _parse(*FISHER)
    assert (config.values_trained(SIZE), config.values_sent(SIZE)) == (SIZE, 2 * SIZE)
    for plain in (_parse(), _parse("aggregate.rule=krum", "aggregate.weighting=uniform")):
        assert (plain.values_trained(SIZE), plain.values_sent(SIZE)) == (SIZE, SIZE)


@pytest.mark.parametrize(
    ("overrides", "bits"),
    [
        ((), 32),
        (("update.compress=float16",), 16),
        (INTEGERS, 16),
        ((*INTEGERS, "secagg.enabled=true"), 19),  # of a sum of eight
    ],
)
def test_the_bytes_of_a_round_are_predicted(overrides: tuple[str, ...], bits: int) -> None:
    """Twice the values up, and an adapter down as ever."""
    plain, fisher = (
        predict_traffic(_parse(*rule, *overrides), SIZE, NAMES[0], NAMES) for rule in ((), FISHER)
    )
    assert plain.down == fisher.down
    assert plain.down == pytest.approx(4 * SIZE, abs=5_000)
    assert fisher.up - plain.up == pytest.approx(SIZE * bits / 8, abs=10)
    config = _parse(*FISHER, *overrides)
    assert site_disk(config, SIZE, 8) > 3 * packed_update(config, SIZE, 8) > 3 * SIZE * bits / 8
