"""Configuration: round trips, what is agreed upon, and what a person is told."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from fedtune.config import (
    PRESETS,
    Config,
    known_keys,
    load_client,
    load_config,
    load_preset,
    load_server,
    parse_config,
    preset_names,
)
from fedtune.errors import ConfigError

POSITIVE = st.floats(0, exclude_min=True, allow_nan=False, allow_infinity=False)
FRACTION = st.floats(0, 1, exclude_min=True, exclude_max=True)
TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)
DOCUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**32 - 1),
        "base": st.fixed_dictionaries({}, optional={"path": TEXT, "pooling": st.just("cls")}),
        "adapter": st.fixed_dictionaries(
            {}, optional={"alpha": POSITIVE, "targets": st.lists(TEXT, max_size=3)}
        ),
        "data": st.fixed_dictionaries(
            {},
            optional={
                "source": TEXT,
                "partition": TEXT,
                "test-fraction": FRACTION,
                "labels": st.lists(TEXT, max_size=3),
            },
        ),
        "train": st.fixed_dictionaries(
            {},
            optional={
                "lr": POSITIVE,
                "weight-decay": POSITIVE,
                "max-grad-norm": POSITIVE,
                "device": st.sampled_from(["auto", "cpu", "cuda:3", "mps"]),
            },
        ),
        "rounds": st.fixed_dictionaries(
            {}, optional={"clients-per-round": st.integers(5, 50), "min-clients": st.integers(1, 5)}
        ),
        "update": st.fixed_dictionaries({}, optional={"compress": st.just("float16")}),
    },
)


def _parse(*overrides: str) -> Config:
    return parse_config("", "test", overrides)


@given(DOCUMENTS)
def test_to_toml_and_back(document: dict[str, Any]):
    import tomli_w

    config = parse_config(tomli_w.dumps(document), "test")
    text = config.to_toml()
    again = parse_config(text, "test")
    assert again == config
    assert again.digest == config.digest
    # Python's own TOML reader finds what was asked for.
    written = tomllib.loads(text)
    for table, value in document.items():
        if isinstance(value, dict):
            assert {key: written[table][key] for key in value} == value
        else:
            assert written[table] == value


def _tables() -> dict[str, type[BaseModel]]:
    """Every table of the configuration by name."""
    return {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def test_every_key_has_a_description_and_a_default():
    described = dict(known_keys())
    keys = {
        f"{name}.{key.replace('_', '-')}"
        for name, table in _tables().items()
        for key in table.model_fields
    }
    assert set(described) == keys | {"seed"}
    assert [key for key, text in described.items() if len(text) < 10] == []
    assert parse_config("", "test") == Config()


def test_every_preset_loads_and_is_what_its_file_says():
    assert "hospitals" in preset_names()
    for name in preset_names():
        config = load_preset(name)
        said = tomllib.loads((PRESETS / f"{name}.toml").read_text())
        written = tomllib.loads(config.to_toml())
        for table, value in said.items():
            if isinstance(value, dict):
                assert {key: written[table][key] for key in value} == value
            else:
                assert written[table] == value
    with pytest.raises(ConfigError, match="hospitals"):
        load_preset("hospital")


def test_keys_of_a_preset_can_be_left_out():
    assert load_preset("hospitals").data.clients == 8
    assert load_preset("hospitals", without=["data.clients", "data.nothing"]).data.clients is None


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.lr=1e-3", lambda c: c.train.lr == 1e-3),
        ("train.lr=1", lambda c: c.train.lr == 1.0),
        ("seed=7", lambda c: c.seed == 7),
        ("data.source=/some/folder", lambda c: c.data.source == "/some/folder"),
        ("data.source=a=b", lambda c: c.data.source == "a=b"),
        ("data.source = 'quoted' ", lambda c: c.data.source == "quoted"),
        ("data.partition=dirichlet:0.3", lambda c: c.data.partition == "dirichlet:0.3"),
        ('adapter.targets=["a", "b"]', lambda c: c.adapter.targets == ("a", "b")),
        ("train.schedule=linear", lambda c: c.train.schedule == "linear"),
    ],
)
def test_override(override, read):
    assert read(_parse(override))


def test_the_last_override_wins_over_the_file():
    config = parse_config("[train]\nlr = 0.5\n", "test", ["train.lr=0.25", "train.lr=0.125"])
    assert config.train.lr == 0.125


@pytest.mark.parametrize(
    "override", ["train.lr", "=3", "train..lr=1", ".lr=1", "seed.deep=1", "train=3"]
)
def test_an_override_that_is_none(override):
    with pytest.raises(
        ConfigError, match=override.split(".", maxsplit=1)[0].strip("=3") or "--set"
    ):
        _parse(override)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.batchsize=4", "train.batch-size"),
        pytest.param(
            "train.batch_size=4",
            "train.batch-size",
        ),
        ("data.sorce=x", "data.source"),
        pytest.param(
            "rounds.lr=1",
            "train.lr",
        ),
        ("sed=1", "seed"),
        ("lr=1", "train.lr"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(override, nearest):
    with pytest.raises(ConfigError, match=rf"did you mean {nearest}\?"):
        _parse(override)


def test_an_unknown_key_that_is_like_none_is_refused_with_those_of_its_table():
    with pytest.raises(ConfigError, match="compress"):
        _parse("update.zzzzzzzz=1")


@pytest.mark.parametrize(
    "override",
    [
        "seed=-1",
        "seed=4294967296",
        "seed=1.5",
        "seed=true",
        "train.steps=0",
        "train.steps='3'",
        "train.lr=0",
        "train.lr=inf",
        "train.lr=nan",
        "train.final-lr-fraction=nan",
        "train.max-grad-norm=-1",
        "train.device=gpu",
        "train.device=cuda:",
        "train.device=cuda:x",
        "train.device=cpu:0",
        "adapter.dropout=1.0",
        "adapter.rank=0",
        "adapter.targets=query",
        "data.test-fraction=1",
        "rounds.timeout=0",
        "aggregate.server-momentum=1",
        "aggregate.rule=krum",
        "update.compress=zip",
        "base.path=''",
    ],
)
def test_a_value_out_of_range_is_refused_by_its_key(override):
    with pytest.raises(ConfigError, match=override.partition("=")[0].partition(".")[0]):
        _parse(override)


@pytest.mark.parametrize(
    "overrides",
    [
        ("rounds.min-clients=5", "rounds.clients-per-round=4"),
        ("rounds.min-clients=5", "data.clients=4"),
        ("rounds.clients-per-round=5", "data.clients=4"),
    ],
)
def test_a_cohort_that_can_never_be_is_refused(overrides):
    with pytest.raises(ConfigError, match=overrides[0].partition("=")[0]):
        _parse(*overrides)
    key, _, _ = overrides[0].partition("=")
    assert _parse(f"{key}=4", *overrides[1:]) != Config()


def test_all_errors_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        _parse("train.steps=0", "adapter.rank=0")
    assert "train.steps" in str(caught.value)
    assert "adapter.rank" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "train.device=cuda",
        "train.threads=7",
        "data.source=/elsewhere",
        "data.partition=iid",
        "data.clients=3",
        "data.text-column=note",
        "data.test-fraction=0.5",
    ],
)
def test_what_is_each_machines_own_business_is_not_in_the_digest(override):
    config = _parse(override)
    assert config != Config()
    assert config.digest == Config().digest


def _other(key: str, default: object) -> str:
    """An override that gives `key` another value than its default."""
    words = {
        "base.path": ["other"],
        "base.digest": ["ab" * 32],
        "base.task": ["causal-lm"],
        "base.pooling": ["cls", "mean"],
        "train.method": ["forward-only"],
        "base.placement": ["server"],
        "base.connector-digest": [f'"{"ab" * 32}"'],
        "emulator.layers": ["12"],
        "emulator.share": ["false"],
        "emulator.digest": [f'"{"ab" * 32}"'],
        "split.labels": ["client"],
        "split.activations": ["int8"],
        "split.clip": ["4.0"],
        "split.eta": ["50.0"],
        "train.schedule": ["linear", "cosine"],
        "train.optimizer": ["sgd", "adamw"],
        "train.precision": ["bf16", "float32"],
        "aggregate.weighting": ["uniform", "examples"],
        "aggregate.server-optimizer": ["adam", "sgd"],
        "update.compress": ["float16", "none"],
        "update.clip": ["3.0"],
        "update.bits": ["12"],
        "secagg.enabled": ["true"],
        "secagg.threshold": ["0.75"],
        "secagg.neighbours": ["4"],
        "privacy.unit": ["record"],
        "privacy.epsilon": ["7.0"],
        "privacy.noise-multiplier": ["1.5"],
    }
    if key in words:
        return next(word for word in words[key] if word != default)
    if isinstance(default, tuple):
        return '["x"]'
    if isinstance(default, float):
        return str(default / 2 if default else 0.5)
    return str(int(default) + 1 if isinstance(default, int) else 1)


# What a key needs beside it to be allowed.
_FORWARD_ONLY = ['train.method="forward-only"', 'train.optimizer="sgd"']
_VISION = ['base.task="visual-question-answering"', 'adapter.kind="nano"']
_AT_SERVER = [*_VISION, 'base.placement="server"']
_EMULATED = [*_VISION, 'base.placement="emulator"']
_COMPANIONS = {
    "base.placement": _VISION,
    "emulator.layers": _EMULATED,
    "emulator.share": _EMULATED,
    "emulator.digest": _EMULATED,
    "adapter.output-rank": _VISION,
    "adapter.rungs": ['base.task="visual-question-answering"', 'adapter.kind="ladder"'],
    "split.clip": [*_AT_SERVER, "split.eta=60.0"],
    "split.eta": [*_AT_SERVER, "split.clip=5.0"],
    "train.method": _FORWARD_ONLY[1:],
    "train.directions": _FORWARD_ONLY,
    "train.probes": [*_FORWARD_ONLY, *_AT_SERVER],
    "train.perturbation": _FORWARD_ONLY,
    "aggregate.fisher-damping": ['aggregate.rule="fisher"'],
    "update.clip": ["update.bits=10"],
    "update.bits": ["update.clip=1.0"],
    "secagg.enabled": ["update.bits=11", "update.clip=1.0"],
    "privacy.unit": ["privacy.epsilon=3.0"],
    "privacy.epsilon": ['privacy.unit="record"'],
    "privacy.noise-multiplier": ['privacy.unit="record"'],
}


def test_everything_else_is_in_the_digest():
    digests = {"": Config().digest}
    not_agreed = {"base.path", "base.connector", "emulator.path"}
    not_agreed |= {"train.device", "train.threads"}
    # There is one encoder, and the others go with keys of their own.
    not_agreed |= {"base.encoder", "adapter.kind", "aggregate.rule"}
    for name, table in _tables().items():
        for key, field in table.model_fields.items():
            path = f"{name}.{key.replace('_', '-')}"
            if name != "data" and path not in not_agreed:
                value = f"{path}={_other(path, field.default)}"
                digests[path] = _parse(value, *_COMPANIONS.get(path, [])).digest
    digests["seed"] = _parse("seed=1").digest
    digests["data.labels"] = _parse('data.labels=["a", "b"]').digest
    digests["data.labels in another order"] = _parse('data.labels=["b", "a"]').digest
    same: dict[str, list[str]] = {}
    for key, digest in digests.items():
        same.setdefault(digest, []).append(key)
    assert [keys for keys in same.values() if len(keys) > 1] == []
    assert len(digests) > 30


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Config().train.lr = 1.0  # type: ignore[misc]


def test_files(tmp_path):
    path = tmp_path / "federation.toml"
    with pytest.raises(ConfigError, match=r"federation\.toml"):
        load_config(path)
    path.write_bytes(b"seed = 3\n# \xff")
    with pytest.raises(ConfigError, match=r"federation\.toml"):
        load_config(path)
    path.write_text("seed = ")
    with pytest.raises(ConfigError, match="TOML"):
        load_config(path)
    path.write_text("seed = 3\n[train]\nlr = 0.5\n")
    assert load_config(path, ["train.lr=0.25"]) == _parse("seed=3", "train.lr=0.25")


@pytest.mark.parametrize(
    ("status", "address"),
    [
        ("", None),
        ("127.0.0.1:9093", ("127.0.0.1", 9093)),
        ("[::1]:0", ("::1", 0)),
        ("localhost:65535", ("localhost", 65535)),
    ],
)
def test_the_status_of_a_server_has_an_address(
    tmp_path: Path, status: str, address: tuple[str, int] | None
) -> None:
    file = tmp_path / "server.toml"
    file.write_text(f'[server]\nstatus = "{status}"\n')
    assert load_server(file).server.status_address == address


@pytest.mark.parametrize("status", ["9093", ":9093", "localhost", "::1:", "host:65536", "host:-1"])
def test_what_is_no_address_is_refused(tmp_path: Path, status: str) -> None:
    file = tmp_path / "server.toml"
    file.write_text(f'[server]\nstatus = "{status}"\n')
    with pytest.raises(ConfigError, match=r"server\.status must be an address and a port"):
        load_server(file)


@pytest.mark.parametrize(
    ("runtime", "line", "named"),
    [
        ("torch", "max-memory-mb = 250", "max-memory-mb"),
        ("torch", 'moments = "moments.safetensors"', "moments"),
        ("torch", f'artifacts-digest = "{"0" * 64}"', "artifacts-digest"),
        ("torch", 'precision = "int8"', "precision"),
        ("ort", 'base = "/models/base"', "base"),
        ("stepgraph", 'base = "/models/base"', "base"),
    ],
)
def test_keys_of_a_machine_are_refused_where_its_runtime_does_not_use_them(
    tmp_path: Path, runtime: str, line: str, named: str
) -> None:
    file = tmp_path / "client.toml"
    file.write_text(f'[machine]\nruntime = "{runtime}"\n{line}\n')
    with pytest.raises(ConfigError, match=rf"machine\.{named} is for machine\.runtime = "):
        load_client(file)
    other = "stepgraph" if runtime == "torch" else "torch"
    file.write_text(f'[machine]\nruntime = "{other}"\n{line}\n')
    assert load_client(file).machine.runtime == other
