"""What gray-box readouts and ladders cannot be combined with is refused, by name."""

from __future__ import annotations

import pytest

from fedtune.config import Config, load_preset
from fedtune.errors import ConfigError

FORWARD_ONLY = (
    *("train.method=forward-only", "train.optimizer=sgd", "train.max-grad-norm=unset"),
    "aggregate.rule=fedavg",
)
GRAY_BOX = ("adapter.output-rank=16", "split.labels=client")
LADDER = ("adapter.kind=ladder",)


def _preset(*overrides: str) -> Config:
    return load_preset("vqa", overrides)


@pytest.mark.parametrize(
    ("overrides", "rungs", "labels_at"),
    [
        ((), 0, "server"),
        (GRAY_BOX, 1, "client"),
        (("adapter.output-rank=16", "base.placement=client"), 1, "server"),
        (LADDER, 6, "client"),
        ((*LADDER, "adapter.rungs=3"), 3, "client"),
    ],
)
def test_what_the_base_model_answers_with(
    overrides: tuple[str, ...], rungs: int, labels_at: str
) -> None:
    found = _preset(*overrides)
    assert (found.rungs, found.labels_at) == (rungs, labels_at)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (GRAY_BOX[:1], r"set split\.labels = client"),
        ((*GRAY_BOX, *LADDER), r"adapter\.output-rank is for adapter\.kind = nano"),
        (("adapter.rungs=3",), r"adapter\.rungs is for adapter\.kind = ladder"),
        ((*LADDER, "adapter.rungs=1"), r"adapter\.rungs: .*greater than or equal to 2"),
        ((*GRAY_BOX, *FORWARD_ONLY), r"adapter\.output-rank and adapter\.kind = ladder"),
        ((*LADDER, *FORWARD_ONLY), r"adapter\.output-rank and adapter\.kind = ladder"),
        ((*LADDER, "base.task=causal-lm"), "go together"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: tuple[str, ...], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        _preset(*overrides)
