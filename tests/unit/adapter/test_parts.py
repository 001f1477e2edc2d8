"""Which tensors of an adapter travel, and which never do."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.adapter.parts import parts_of, shared_manifest
from fedtune.config import parse_config
from fedtune.errors import ConfigError
from fedtune.types import Manifest

MANIFEST = Manifest.of(
    [
        ("model.layer.1.query.lora_A.weight", (2, 3)),
        ("model.layer.1.query.lora_B.weight", (3, 2)),
        ("model.layer.10.query.lora_A.weight", (1, 4)),
        ("model.layer.10.query.lora_B.weight", (4,)),
        ("model.classifier.bias", (2,)),
    ]
)
NAMES = [tensor.name for tensor in MANIFEST.tensors]


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (["classifier"], [0, 1, 2, 3]),
        (["layer.1"], [2, 3, 4]),  # and not layer 10
        (["lora_B"], [0, 2, 4]),
        (["classifier.bias", "layer.10"], [0, 1]),
        ([NAMES[2]], [0, 1, 3, 4]),
        ([], [0, 1, 2, 3, 4]),
    ],
)
def test_a_pattern_is_whole_parts_of_a_name(patterns, left):
    assert [t.name for t in shared_manifest(patterns, MANIFEST).tensors] == [NAMES[n] for n in left]


@pytest.mark.parametrize("pattern", ["layer.2", "class", "lora", "ayer.1", "bias.classifier"])
def test_what_fits_nothing_is_told_with_what_there_is(pattern):
    with pytest.raises(ConfigError) as caught:
        shared_manifest(["classifier", pattern], MANIFEST)
    assert f"'{pattern}'" in str(caught.value)
    assert all(name in str(caught.value) for name in NAMES)


@pytest.mark.parametrize("patterns", [["model"], ["layer", "classifier"]])
def test_something_must_be_shared(patterns):
    with pytest.raises(ConfigError, match="nothing to share"):
        parts_of(patterns, MANIFEST, np.zeros(MANIFEST.size, np.float32))


def test_the_parts_are_the_tensors_of_these_names():
    whole = np.arange(MANIFEST.size, dtype=np.float32)
    parts = parts_of(["lora_A", "classifier"], MANIFEST, -whole)
    assert parts is not None
    shared, private = parts.shared_of(whole), parts.private_of(whole)
    views = MANIFEST.split(whole)
    for name, view in parts.shared.split(shared).items():
        assert np.array_equal(view, views[name])
    assert private.tolist() == [*range(6), *range(12, 16), *range(20, 22)]
    assert parts.private_size == len(private)
    assert np.array_equal(parts.join(shared, private), whole)
    joined = parts.join(shared, parts.private_of(parts.start))
    assert np.array_equal(np.flatnonzero(joined != whole), private[1:])  # 0 is -0


@pytest.mark.parametrize("value", ['[""]', '[".classifier"]', '["a b"]', '"classifier"'])
def test_a_pattern_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match=r"adapter\.private"):
        parse_config("", "test", [f"adapter.private={value}"])


def test_directions_of_the_whole_adapter_have_no_private_part():
    forward = ("train.method=forward-only", "train.optimizer=sgd", 'adapter.private=["lora_B"]')
    with pytest.raises(ConfigError, match=r"adapter\.private; use train\.method = backprop"):
        parse_config("", "test", forward)
