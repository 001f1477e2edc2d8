"""Keys of [emulator]: what they go with."""

from __future__ import annotations

import pytest

from fedtune.config import Config, parse_config
from fedtune.errors import ConfigError

VISION = ("base.task=visual-question-answering", "adapter.kind=nano")
EMULATED = (*VISION, "base.placement=emulator")


def parse(*overrides: str) -> Config:
    return parse_config("", "test", overrides)


def test_where_the_emulator_lies_is_each_partys_own_business() -> None:
    here = parse(*EMULATED, 'emulator.path="/srv/emulator"')
    assert here.digest == parse(*EMULATED).digest != parse(*EMULATED, "emulator.layers=5").digest


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((*VISION, "emulator.layers=12"), "are for base.placement = emulator"),
        (
            (*VISION, "base.placement=server", "emulator.share=false"),
            "are for base.placement = emulator",
        ),
        (("base.placement=emulator",), "is for base.task = visual-question-answering"),
        ((*EMULATED, "emulator.layers=2"), "emulator.layers"),
        ((*EMULATED, "emulator.digest=abc"), "emulator.digest"),
        ((*EMULATED, "split.clip=4.0", "split.eta=50.0"), "base.placement = server"),
        (
            (*EMULATED, "train.method=forward-only", "train.optimizer=sgd", "train.probes=4"),
            "train.probes is for",
        ),
    ],
)
def test_what_does_not_go_with_an_emulator_is_refused(
    overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(*overrides)
