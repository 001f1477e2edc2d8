"""The text form of a partition."""

import pytest

from fedtune.data import PartitionSpec
from fedtune.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("iid", PartitionSpec("iid")),
        ("dirichlet:0.3", PartitionSpec("dirichlet", alpha=0.3)),
        ("dirichlet:10", PartitionSpec("dirichlet", alpha=10.0)),
        ("column:hospital", PartitionSpec("column", column="hospital")),
        ("column:a:b", PartitionSpec("column", column="a:b")),
        ("shards:2", PartitionSpec("shards", shards_per_client=2)),
    ],
)
def test_text_and_back(text, spec):
    assert PartitionSpec.parse(text) == spec
    assert str(spec) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "iid:",
        "iid:3",
        "IID",
        "dirichlet",
        "dirichlet:",
        "dirichlet:x",
        "column",
        "shards",
        "shards:",
        "shards:1.5",
        "n:x",
        ":3",
    ],
)
def test_wrong_text_names_the_valid_forms(text):
    with pytest.raises(ConfigError) as caught:
        PartitionSpec.parse(text)
    assert repr(text) in str(caught.value)
    for form in ("'iid'", "'dirichlet:ALPHA'", "'column:NAME'", "'shards:PER_CLIENT'"):
        assert form in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "dirichlet:0",
        "dirichlet:-1",
        "dirichlet:nan",
        "dirichlet:inf",
        "dirichlet:1e308",
        "shards:0",
        "column:",
    ],
)
def test_values_out_of_range(text):
    with pytest.raises(ConfigError, match="such as"):
        PartitionSpec.parse(text)


def test_parameters_of_another_kind():
    for wrong in (("iid", 0.3), ("dirichlet",), ("dirichlet", None, "x"), ("column", 1.0, "x")):
        with pytest.raises(ConfigError, match="wrong parameters"):
            PartitionSpec(*wrong)
