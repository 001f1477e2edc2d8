"""What forward-only training cannot be combined with is refused, by name."""

from __future__ import annotations

import pytest

from fedtune.config import Config, parse_config
from fedtune.errors import ConfigError

FORWARD_ONLY = ("train.method=forward-only", "train.optimizer=sgd")


def _parse(*overrides: str) -> Config:
    return parse_config("", "test", overrides)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["train.optimizer=adamw"], "train.optimizer"),
        (["train.weight-decay=0.1"], "train.weight-decay"),
        (["train.max-grad-norm=1.0"], "train.max-grad-norm"),
        (["train.precision=bf16"], "train.precision"),
        (["adapter.dropout=0.1"], "adapter.dropout"),
        (["privacy.unit=record", "privacy.epsilon=3.0"], "privacy.unit = client"),
        (["train.directions=0"], "train.directions"),
        (["train.perturbation=0.0"], "train.perturbation"),
    ],
)
def test_what_it_cannot_be_combined_with_is_refused(overrides: list[str], named: str) -> None:
    _parse(*FORWARD_ONLY)
    with pytest.raises(ConfigError, match=named):
        _parse(*FORWARD_ONLY, *overrides)


def test_an_optimizer_must_be_named() -> None:
    """The default is AdamW, and nobody gets another one without having asked for it."""
    with pytest.raises(ConfigError, match=r"train\.optimizer = sgd"):
        _parse("train.method=forward-only")


@pytest.mark.parametrize("key", ["directions=512", "perturbation=0.5"])
def test_its_keys_are_refused_where_they_mean_nothing(key: str) -> None:
    assert _parse(*FORWARD_ONLY, f"train.{key}").train.method == "forward-only"
    with pytest.raises(ConfigError, match="forward-only"):
        _parse(f"train.{key}")


def test_what_a_run_has_stored_is_accepted_again() -> None:
    """It names every key, also those that are for the other method."""
    for config in (_parse(), _parse(*FORWARD_ONLY, "train.directions=77")):
        assert parse_config(config.to_toml(), "test") == config


def test_so_many_values_travel() -> None:
    assert _parse().values_sent(81_813) == 81_813
    assert _parse(*FORWARD_ONLY, "train.directions=77").values_sent(81_813) == 77
