"""A masked federation that merges by Fisher information, by the installed command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from e2e_helpers import Launcher, adapter_bytes, read_metrics, read_summary

from fedtune.config import load_config
from fedtune.deploy.doctor.traffic import predict_traffic

FISHER = ("--set", "aggregate.rule=fisher", "--set", "update.bits=20")


def test_a_masked_run_ends_and_sends_twice_as_much(launcher: Launcher, quick: list[str]) -> None:
    summaries = {}
    for name, settings in (("average", ("--set", "update.bits=20")), ("fisher", FISHER)):
        code, command = launcher.run(*quick, *settings, "--out", name)
        assert code == 0, command.stderr
        summaries[name] = read_summary(launcher.folder / name)
    average, fisher = summaries["average"], summaries["fisher"]
    size = fisher["adapter_parameters"]
    ring_bits = 22  # of four clients with 20 bits each
    more = fisher["bytes_up_per_client_round"] - average["bytes_up_per_client_round"]
    assert more == pytest.approx(size * ring_bits / 8, abs=20)
    assert fisher["bytes_down_per_client_round"] == pytest.approx(
        average["bytes_down_per_client_round"], abs=20
    )
    run = launcher.folder / "fisher"
    config = load_config(run / "config.toml")
    assert config.secagg.enabled
    records = read_metrics(run)
    found = predict_traffic(config, size, records[0]["clients"][0], records[0]["clients"])
    assert found.up == pytest.approx(fisher["bytes_up_per_client_round"], rel=0.01)
    assert records[-1]["train_loss"] < records[0]["train_loss"]
    assert records[-1]["loss"] < np.log(4) - 0.05
    assert json.loads((run / "adapter" / "passport.json").read_text())["rule"] == "fisher"
    assert adapter_bytes(run) != adapter_bytes(launcher.folder / "average")


def test_masks_change_nothing(launcher: Launcher, quick: list[str]) -> None:
    """The same integers are summed and divided, over rounds with the server's momentum."""
    momentum = ("--set", "aggregate.server-momentum=0.5", "--workers", "0")
    whole: list[Path] = []
    for name, settings in (("masked", ()), ("clear", ("--set", "secagg.enabled=false"))):
        code, command = launcher.run(*quick, *FISHER, *momentum, *settings, "--out", name)
        assert code == 0, command.stderr
        whole.append(launcher.folder / name)
    assert adapter_bytes(whole[0]) == adapter_bytes(whole[1])


def test_with_a_unit_of_privacy_it_is_refused_before_anything_is_loaded(
    run_main: Callable[..., tuple[int, str, str]],
) -> None:
    privacy = ("--set", "privacy.unit=record", "--set", "privacy.epsilon=3")
    code, _, err = run_main("simulate", *FISHER, *privacy)
    assert code == 2
    assert "aggregate.rule = fisher" in err
    assert "privacy.unit = record" in err
