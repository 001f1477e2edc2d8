"""Wrong input through the real command line: exit code 2, one line that says what, no trace."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from e2e_helpers import Launcher, line_count, read_rows, tree, wait_until, write_rows

RunMain = Callable[..., tuple[int, str, str]]
PEOPLE = ("anna", "ben")


@dataclass(frozen=True)
class Wrong:
    """One wrong command line; `says` are parts of the one line that it must print.

    Words in braces are folders: {base}, {clients}; other files are those of `workshop`.
    """

    name: str
    arguments: tuple[str, ...]
    says: tuple[str, ...]


def setting(name: str, text: str, *says: str) -> Wrong:
    """A wrong `--set` of an otherwise right simulation."""
    return Wrong(name, (*SIMULATE, "--set", text), says or (text.partition("=")[0],))


def flag(name: str, *arguments: str, says: tuple[str, ...]) -> Wrong:
    """Wrong flags of an otherwise right simulation."""
    return Wrong(name, (*SIMULATE, *arguments), says)


def data(name: str, path: str, *arguments: str, says: tuple[str, ...]) -> Wrong:
    """Wrong data for an otherwise right simulation."""
    return Wrong(name, (*BASE, "--data", path, *arguments), (*says,))


BASE = ("simulate", "--base", "{base}", "--rounds", "1", "--workers", "0", "--set", "train.steps=1")
SIMULATE = (*BASE, "--data", "{clients}")


CONFIGURATION = [
    setting("unknown key in train", "train.learning-rate=1e-3", "train.learning-rate", " lr,"),
    setting("unknown key in rounds", "rounds.counts=3", "rounds.counts", "rounds.count?"),
    setting("unknown key in adapter", "adapter.rnk=3", "adapter.rnk", "adapter.rank?"),
    setting("unknown key in data", "data.test_frac=0.3", "data.test_frac", "data.test-fraction?"),
    setting("key of another table", "base.rank=3", "base.rank", "adapter.rank?"),
    setting("unknown key at the top", "sed=3", "sed", "seed?"),
    setting(
        "mistyped table",
        *("trian.lr=1e-3", "trian", "train"),
    ),
    setting("table as a value", "train=3", "train"),
    setting("value as a table", "seed.x=3", "seed.x", "not a table"),
    setting("text for a number", "train.steps=many", "train.steps", "'many'"),
    setting("number for a text", "base.path=3", "base.path"),
    setting("fraction for a count", "rounds.count=2.5", "rounds.count", "2.5"),
    setting("truth value for a count", "adapter.rank=true", "adapter.rank"),
    setting("text for a list", "adapter.targets=query", "adapter.targets"),
    setting("unknown choice", "train.optimizer=adam", "train.optimizer", "adamw", "sgd"),
    setting("unknown rule", "aggregate.rule=median", "aggregate.rule", "fedavg"),
    setting("unknown pooling", "base.pooling=max", "base.pooling", "mean"),
    setting("rank 0", "adapter.rank=0"),
    setting("negative lr", "train.lr=-0.1"),
    setting("lr 0", "train.lr=0"),
    setting("lr nan", "train.lr=nan"),
    setting("lr inf", "train.lr=inf"),
    setting("batch 0", "train.batch-size=0"),
    setting("steps 0", "train.steps=0"),
    setting("dropout 1", "adapter.dropout=1"),
    setting("test-fraction 0", "data.test-fraction=0"),
    setting("test-fraction 1", "data.test-fraction=1"),
    setting("momentum 1", "aggregate.server-momentum=1"),
    setting("timeout 0", "rounds.timeout=0"),
    setting("threads 0", "train.threads=0"),
    setting("device nobody knows", "train.device=tpu", "train", "cuda:N"),
    setting("device without a number", "train.device=cuda:x", "train", "cuda:N"),
    setting("--set without =", "train.lr", "--set train.lr", "table.key=value"),
    setting("--set without key", "=3", "--set =3", "table.key=value"),
    setting("--set with an empty part", "train..lr=3", "--set train..lr", "table.key=value"),
    setting("--set over two lines", "train\nlr", "table.key=value"),
    setting(
        "--set that smuggles a second key",
        "train.lr=1\nseed=7",
        "train.lr",
    ),
    flag("drop nan", "--drop", "nan", says=("--drop nan", "from 0 to below 1")),
    flag("drop at nowhere", "--drop", "0.2", "--drop-at", "lunch", says=("lunch", "advertise")),
    flag(
        "drop at a stage that there is not",
        *("--drop", "0.2", "--drop-at", "share", "--set", "secagg.enabled=false"),
        says=("--drop-at share", "secure aggregation"),
    ),
    flag("rounds 0", "--rounds", "0", says=("rounds.count", "0")),
    flag("clients 0", "--clients", "0", says=("data.clients", "0")),
    flag("negative seed", "--seed", "-1", says=("seed", "-1")),
    flag("seed too large", "--seed", str(2**32), says=("seed", str(2**32))),
    flag("workers -1", "--workers", "-1", says=("--workers", "-1")),
    flag("rounds not a number", "--rounds", "ten", says=("--rounds", "ten")),
    flag("unknown flag", "--round", "3", says=("--round",)),
    flag("unknown preset", "--preset", "hospital", says=("preset 'hospital'", "hospitals")),
    flag(
        "preset and config",
        *("--preset", "hospitals", "--config", "good.toml"),
        says=("--preset", "--config"),
    ),
    flag("config that is not there", "--config", "nothing.toml", says=("nothing.toml",)),
    flag("config that is a folder", "--config", "runs", says=("runs",)),
    flag("broken TOML", "--config", "broken.toml", says=("broken.toml", "line 2")),
    flag("config not UTF-8", "--config", "latin1.toml", says=("latin1.toml",)),
    flag(
        "unknown key in a file",
        *("--config", "unknown.toml"),
        says=("unknown.toml", "train.step:", "train.steps?"),
    ),
    flag(
        "two wrong keys at once",
        *("--set", "train.lr=-1", "--set", "adapter.rank=0"),
        says=("train.lr", "adapter.rank"),
    ),
    setting(
        "min-clients above clients-per-round",
        "rounds={count=1, min-clients=4, clients-per-round=3}",
        "rounds.min-clients = 4",
        "rounds.clients-per-round = 3",
    ),
    flag(
        "min-clients above --clients",
        *("--clients", "4", "--set", "rounds.min-clients=5"),
        says=("rounds.min-clients = 5", "data.clients = 4"),
    ),
    flag(
        "clients-per-round above --clients",
        *("--clients", "4", "--set", "rounds.clients-per-round=5"),
        says=("rounds.clients-per-round = 5", "data.clients = 4"),
    ),
    setting("min-clients above the folder's", "rounds.min-clients=5"),
    setting("clients-per-round above the folder's", "rounds.clients-per-round=5"),
    setting("cuda where there is none", "train.device=cuda:99", "train.device = cuda:99"),
    flag("existing --out", "--out", "runs/done", says=("runs/done exists", "--out")),
    flag("--out is a file", "--out", "good.toml", says=("good.toml exists", "--out")),
    flag(
        "--out below a file",
        *("--out", "good.toml/run"),
        says=("good.toml",),
    ),
]

DATA = [
    data("no data", "nothing", says=("nothing",)),
    data("missing file", "nothing.jsonl", says=("nothing.jsonl does not exist",)),
    data("empty folder", "empty-folder", says=("empty-folder", "train.jsonl")),
    data("folder of folders without files", "bare", says=("bare", "one has no train file")),
    data("clients without rows", "rowless", says=("rowless", "one has no rows in train.jsonl")),
    data("unknown extension", "notes.xlsx", says=("notes.xlsx", ".jsonl", ".csv")),
    data("file without extension", "notes", says=("notes", ".jsonl", ".csv")),
    data(
        "missing column", "txt.jsonl", says=("txt.jsonl, line 1", "'text'", "did you mean 'txt'?")
    ),
    data("missing column in csv", "lable.csv", says=("lable.csv", "did you mean 'lable'?")),
    data(
        "named column missing",
        *("good.jsonl", "--set", "data.text-column=txet"),
        says=("good.jsonl", "no column 'txet'", "did you mean 'text'?"),
    ),
    data("invalid JSON", "broken.jsonl", says=("broken.jsonl, line 3", "invalid JSON")),
    data("JSON that is no object", "list.jsonl", says=("list.jsonl, line 2", "not a JSON object")),
    data("not UTF-8", "latin1.jsonl", says=("latin1.jsonl, line 2", "UTF-8")),
    data("empty file", "empty.jsonl", says=("empty.jsonl", "no rows")),
    data("only a header", "header.csv", says=("header.csv", "no rows")),
    data("one label", "one-label.jsonl", says=("2 labels", "'same'")),
    data("null label", "null.jsonl", says=("null.jsonl, line 2", "'label' is empty")),
    data("null text", "null-text.jsonl", says=("null-text.jsonl, line 2", "'text' is empty")),
    data("a number as text", "number.jsonl", says=("number.jsonl, line 2", "'text' is a int")),
    data("a fraction as label", "float.jsonl", says=("float.jsonl, line 2", "'label' is a float")),
    data("half a character", "surrogate.jsonl", says=("surrogate.jsonl, line 2", "surrogate")),
    data("ragged csv", "ragged.csv", says=("ragged.csv, line 3", "3 cells")),
    data("parquet that is none", "fake.parquet", says=("fake.parquet", "parquet")),
    data(
        "label not among the given",
        *("good.jsonl", "--set", 'data.labels=["a","c"]'),
        says=("good.jsonl, line 2", "'b'", "'a', 'c'"),
    ),
    data(
        "labels given twice",
        *("good.jsonl", "--set", 'data.labels=["a","b","a"]'),
        says=("labels", "twice"),
    ),
    data(
        "one label given",
        *("good.jsonl", "--set", 'data.labels=["a"]'),
        says=("good.jsonl, line 2", "'b'"),
    ),
    data("two train files", "double", says=("double/one", "train.csv, train.jsonl")),
    data("broken file of one client", "one-broken", says=("one-broken/two/train.jsonl, line 2",)),
    data("wrong test label type", "wrong-test", says=("wrong-test/test.jsonl, line 1", "'label'")),
    data("unknown partition", "good.jsonl", "--partition", "sorted", says=("'sorted'", "iid")),
    data(
        "dirichlet without alpha",
        *("good.jsonl", "--partition", "dirichlet"),
        says=("'dirichlet'", "dirichlet:ALPHA"),
    ),
    data(
        "alpha 0",
        *("good.jsonl", "--partition", "dirichlet:0"),
        says=("dirichlet:0", "alpha above 0"),
    ),
    data(
        "alpha nan", "good.jsonl", "--partition", "dirichlet:nan", says=("dirichlet:nan", "alpha")
    ),
    data("shards 0", "good.jsonl", "--partition", "shards:0", says=("shards:0", "shards:2")),
    data("column without name", "good.jsonl", "--partition", "column:", says=("column:hospital",)),
    data(
        "column that is not there",
        *("good.jsonl", "--partition", "column:hopsital"),
        says=("no column 'hopsital'", "did you mean 'hospital'?"),
    ),
    data(
        "column of other clients",
        *("good.jsonl", "--partition", "column:hospital", "--clients", "5"),
        says=("'hospital'", "5 clients", "set it to 2"),
    ),
    data(
        "more clients than rows",
        *("good.jsonl", "--clients", "500"),
        says=("500 clients", "clients <= 32"),
    ),
    flag(
        "a divided folder, divided", "--partition", "iid", says=("partition", "folder of clients")
    ),
    flag("clients unlike the folder's", "--clients", "3", says=("4 client folders", "not 3")),
    Wrong(
        "column of the packaged data",
        ("simulate", "--base", "{base}", "--set", "train.steps=1", "--partition", "column:x"),
        ("ICD-10", "column:x"),
    ),
]


def model(name: str, path: str, *says: str) -> Wrong:
    """A wrong base model for an otherwise right simulation."""
    return Wrong(name, ("simulate", "--data", "{clients}", "--rounds", "1", "--base", path), says)


BASES = [
    model("no such base", "nowhere/at/all", "nowhere/at/all", "all-MiniLM-L6-v2"),
    model("hub id without a network", "nobody/no-model", "nobody/no-model", "hub"),
    model("base without a model", "empty-folder", "empty-folder", "config.json"),
    model("base that is a file", "good.toml", "good.toml", "config.json"),
    model("pickled weights only", "models/pickled", "models/pickled", "pickled", "safetensors"),
    model("config.json not JSON", "models/broken", "models/broken/config.json", "JSON"),
    model("config.json a list", "models/list", "models/list/config.json", "JSON"),
    model(
        "config.json without kind", "models/kindless", "models/kindless/config.json", "model_type"
    ),
    model("unknown kind of model", "models/strange", "models/strange"),
    model(
        "config.json with text for a number",
        *("models/text", "models/text"),
    ),
    model("weights cut short", "models/short", "models/short"),
    model("weights of another shape", "models/shape", "models/shape"),
    model("tokenizer not JSON", "models/tokenizer", "models/tokenizer", "tokenizer"),
    setting("targets that do not fit", 'adapter.targets=["q_proj"]', "q_proj", "query"),
]

RESUME = [
    *[
        Wrong(f"--resume with {words[0]}", ("simulate", "--resume", "runs/done", *words), words[:1])
        for words in [
            ("--preset", "hospitals"),
            ("--config", "good.toml"),
            ("--data", "good.jsonl"),
            ("--base", "x"),
            ("--partition", "iid"),
            ("--clients", "3"),
            ("--rounds", "9"),
            ("--seed", "1"),
            ("--set", "train.lr=1"),
            ("--out", "elsewhere"),
        ]
    ],
    Wrong("--resume of nothing", ("simulate", "--resume", "runs/none"), ("runs/none",)),
    Wrong("--resume of a file", ("simulate", "--resume", "good.toml"), ("good.toml",)),
    Wrong("--resume of no run", ("simulate", "--resume", "bare"), ("bare", "config.toml")),
    Wrong("--resume without journal", ("simulate", "--resume", "half"), ("half/journal.db",)),
    Wrong("--resume of garbage", ("simulate", "--resume", "garbage"), ("garbage/journal.db",)),
    Wrong("--resume of an empty journal", ("simulate", "--resume", "void"), ("void/journal.db",)),
    Wrong("--resume of a cut journal", ("simulate", "--resume", "cut"), ("cut/journal.db",)),
    Wrong(
        "--resume of a journal without rounds",
        *(("simulate", "--resume", "roundless"), ("roundless",)),
    ),
    Wrong(
        "--resume of another format", ("simulate", "--resume", "future"), ("future", "format 99")
    ),
    Wrong(
        "--resume, config broken", ("simulate", "--resume", "miskeyed"), ("miskeyed/config.toml",)
    ),
    Wrong(
        "--resume, config edited", ("simulate", "--resume", "edited"), ("edited", "configuration")
    ),
    Wrong("--resume, data moved", ("simulate", "--resume", "moved"), ("gone-away",)),
]

OTHERS = [
    Wrong("eval of no run", ("eval", "bare", "--data", "good.jsonl"), ("bare", "passport.json")),
    Wrong("eval of nothing", ("eval", "none", "--data", "good.jsonl"), ("none", "passport.json")),
    Wrong(
        "eval with unknown labels",
        ("eval", "runs/done", "--data", "good.jsonl"),
        ("good.jsonl, line 1", "'a'"),
    ),
    Wrong("eval without data", ("eval", "runs/done", "--data", "nothing.csv"), ("nothing.csv",)),
    Wrong(
        "eval with a wrong column",
        ("eval", "runs/done", "--data", "good.jsonl", "--text-column", "txt"),
        ("no column 'txt'", "'text'"),
    ),
    Wrong(
        "eval of a broken passport",
        ("eval", "forged", "--data", "good.jsonl"),
        ("forged/adapter/passport.json",),
    ),
    Wrong(
        "eval of broken weights",
        ("eval", "weightless", "--data", "good.jsonl"),
        ("weightless/adapter/adapter_model.safetensors",),
    ),
    Wrong(
        "export to an existing folder",
        ("export", "runs/done", "--out", "bare"),
        ("bare exists", "--out"),
    ),
    Wrong("export of no run", ("export", "bare", "--out", "new"), ("bare", "passport.json")),
    Wrong(
        "export in an unknown format",
        ("export", "runs/done", "--format", "gguf", "--out", "new"),
        ("--format gguf", "merged", "adapter"),
    ),
    Wrong("report on no run", ("report", "bare"), ("bare", "not the folder of a finished run")),
    Wrong("report on nothing", ("report", "none"), ("none", "not the folder of a finished run")),
    Wrong(
        "report on a broken summary",
        *(("report", "forged"), ("forged",)),
    ),
    Wrong("init of an unknown preset", ("init", "--preset", "clinic"), ("'clinic'", "hospitals")),
]


@pytest.fixture(scope="session")
def workshop(
    tmp_path_factory: pytest.TempPathFactory,
    finished_run: tuple[Path, str, str],
    tiny_base: Path,
) -> Path:
    """A working directory full of wrong files, and with one good run in it."""
    folder = tmp_path_factory.mktemp("workshop")
    good = [
        {"text": f"text {i}", "label": "ab"[i % 2], "hospital": PEOPLE[i // 5 % 2]}
        for i in range(40)
    ]
    write_rows(folder / "good.jsonl", good)
    _configurations(folder)
    _tables(folder, good)
    _models(folder / "models", tiny_base)
    _runs(folder, finished_run[0])
    return folder


def _configurations(folder: Path) -> None:
    (folder / "good.toml").write_text("seed = 1\n")
    (folder / "broken.toml").write_text("seed = 1\n[train\n")
    (folder / "latin1.toml").write_bytes("# größe\nseed = 1\n".encode("latin-1"))
    (folder / "unknown.toml").write_text("[train]\nstep = 3\n")


def _tables(folder: Path, good: list[dict[str, str]]) -> None:
    (folder / "notes.xlsx").write_bytes(b"PK")
    (folder / "notes").write_text("text,label\n")
    (folder / "lable.csv").write_text("text,lable\nx,a\ny,b\n")
    (folder / "header.csv").write_text("text,label\n")
    (folder / "ragged.csv").write_text("text,label\nx,a\ny,b,c\n")
    (folder / "fake.parquet").write_bytes(b"PAR1 is not enough")
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "broken.jsonl").write_text('{"text": "x", "label": "a"}\n\n{"text": "y"\n')
    (folder / "latin1.jsonl").write_bytes(
        b'{"text": "x", "label": "a"}\n{"text": "gr\xf6\xdfe", "label": "b"}\n'
    )
    first: dict[str, object] = {"text": "x", "label": "a"}
    for name, second in {
        "list": ["y", "b"],
        "null": {"text": "y", "label": None},
        "null-text": {"text": None, "label": "b"},
        "number": {"text": 7, "label": "b"},
        "float": {"text": "y", "label": 0.5},
        "surrogate": {"text": "half \ud83d", "label": "b"},
    }.items():
        lines = [json.dumps(row) for row in (first, second)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    write_rows(folder / "txt.jsonl", [{"txt": "x", "label": "a"}])
    write_rows(folder / "one-label.jsonl", [{"text": f"t{i}", "label": "same"} for i in range(40)])
    (folder / "empty-folder").mkdir()
    (folder / "bare" / "one").mkdir(parents=True)
    write_rows(folder / "rowless" / "one" / "train.jsonl", [])
    write_rows(folder / "double" / "one" / "train.jsonl", good)
    (folder / "double" / "one" / "train.csv").write_text("text,label\nx,a\n")
    write_rows(folder / "one-broken" / "one" / "train.jsonl", good)
    write_rows(folder / "one-broken" / "two" / "train.jsonl", [good[0], {"text": "", "label": "a"}])
    write_rows(folder / "wrong-test" / "one" / "train.jsonl", good)
    write_rows(folder / "wrong-test" / "test.jsonl", [{"text": "x", "label": ["a"]}])


def _models(folder: Path, tiny: Path) -> None:
    config: dict[str, Any] = json.loads((tiny / "config.json").read_text())
    for name, text in {
        "pickled": json.dumps(config),
        "broken": "{",
        "list": "[1]",
        "kindless": json.dumps({"hidden_size": 32}),
        "strange": json.dumps({**config, "model_type": "strange"}),
        "text": json.dumps({**config, "hidden_size": "wide"}),
        "short": json.dumps(config),
        "shape": json.dumps({**config, "intermediate_size": 48}),
        "tokenizer": json.dumps(config),
    }.items():
        model_folder = folder / name
        model_folder.mkdir(parents=True)
        for file in tiny.iterdir():
            if file.name != "config.json":
                (model_folder / file.name).symlink_to(file)
        (model_folder / "config.json").write_text(text)
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    short = folder / "short" / "model.safetensors"
    weights = short.read_bytes()
    short.unlink()
    short.write_bytes(weights[: len(weights) // 2])
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "tokenizer.json").write_text("{")


def _runs(folder: Path, run: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(run, folder / name))

    copy("runs/done")
    (copy("half") / "journal.db").unlink()
    (copy("garbage") / "journal.db").write_bytes(b"not a database at all" * 100)
    (copy("void") / "journal.db").write_bytes(b"")
    cut = copy("cut") / "journal.db"
    cut.write_bytes(cut.read_bytes()[: 4096 * 4])
    for name, change in {
        "future": "UPDATE identity SET value = '99' WHERE key = 'format'",
        "roundless": "DELETE FROM rounds",
    }.items():
        with sqlite3.connect(copy(name) / "journal.db") as database:
            database.execute(change)
        database.close()
    _edit(copy("miskeyed") / "config.toml", "steps = ", "stepps = ")
    _edit(copy("edited") / "config.toml", "lr = 0.02", "lr = 0.03")
    clients = next(
        line for line in (run / "config.toml").read_text().splitlines() if "source" in line
    )
    _edit(copy("moved") / "config.toml", clients, 'source = "gone-away"')
    forged = copy("forged")
    (forged / "adapter" / "passport.json").write_text('{"base": 3}')
    (forged / "summary.json").write_text('{"name": 3}')
    (copy("weightless") / "adapter" / "adapter_model.safetensors").write_bytes(b"no weights")


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(
            row,
            id=row.name.replace("\n", " "),
        )
        for row in [*CONFIGURATION, *DATA, *BASES, *RESUME, *OTHERS]
    ],
)
def test_is_refused_in_one_line_and_leaves_no_trace(
    wrong: Wrong,
    workshop: Path,
    run_main: RunMain,
    monkeypatch: pytest.MonkeyPatch,
    tiny_base: Path,
    client_folders: Path,
) -> None:
    monkeypatch.chdir(workshop)
    before = tree(workshop)
    folders = {"{base}": str(tiny_base), "{clients}": str(client_folders)}
    arguments = [folders.get(word, word) for word in wrong.arguments]

    try:
        code, out, err = run_main(*arguments)
        after = tree(workshop)
    finally:
        _restore(workshop, before)  # whatever is wrong with this row is not the next one's

    assert after == before
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("fedtune: ")
    assert err.endswith("\n")
    for part in wrong.says:
        assert part in err
    assert code == 2


def _restore(folder: Path, before: dict[str, str]) -> None:
    for name in sorted(set(tree(folder)) - set(before), reverse=True):
        path = folder / name
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()


@pytest.mark.parametrize(
    ("arguments", "promise"),
    [
        (("--partition", "dirichlet:0.001", "--clients", "4"), r"(dirichlet:[0-9.]+) works"),
        (("--partition", "dirichlet:0.01", "--clients", "9"), r"(dirichlet:[0-9.]+) works"),
        (("--partition", "dirichlet:1000", "--clients", "40"), r"clients = ([0-9]+) works"),
        (("--partition", "iid", "--clients", "33"), r"clients <= ([0-9]+)"),
        (("--partition", "shards:3", "--clients", "20"), r"clients <= ([0-9]+)"),
        (("--partition", "shards:3", "--clients", "20"), r"or (shards:[0-9]+)"),
        (("--partition", "column:hospital", "--clients", "3"), r"set it to ([0-9]+)"),
    ],
)
def test_a_setting_that_the_message_promises_works(
    arguments: tuple[str, ...],
    promise: str,
    workshop: Path,
    tmp_path: Path,
    run_main: RunMain,
    monkeypatch: pytest.MonkeyPatch,
    tiny_base: Path,
) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    given = {arguments[0]: arguments[1], arguments[2]: arguments[3]}

    def simulate() -> tuple[int, str, str]:
        words = [word for pair in given.items() for word in pair]
        data = str(workshop / "good.jsonl")
        base = [str(tiny_base) if word == "{base}" else word for word in BASE]
        return run_main(*base, "--data", data, *words, "--set", "secagg.enabled=false")

    code, _, err = simulate()
    assert code == 2
    found = re.search(promise, err)
    assert found, err

    flag = "--partition" if ":" in found[1] else "--clients"
    given[flag] = found[1]

    code, _, err = simulate()
    assert code == 0, err
    [run] = (tmp_path / "runs").iterdir()
    assert (run / "adapter").is_dir()


def test_the_promised_alpha_is_the_smallest_of_the_ladder(
    workshop: Path, run_main: RunMain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ("simulate", "--data", str(workshop / "good.jsonl"), "--clients", "9")

    _, _, err = run_main(*data, "--partition", "dirichlet:0.001")
    promised = float(err.split("dirichlet:")[2].split()[0])

    for smaller in (a for a in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0) if a < promised):
        code, _, err = run_main(*data, "--partition", f"dirichlet:{smaller:g}")
        assert code == 2
        assert f"dirichlet:{promised:g} works" in err


def test_the_run_folder_that_is_in_the_way_can_be_resumed_as_the_message_says(
    workshop: Path,
    tmp_path: Path,
    run_main: RunMain,
    monkeypatch: pytest.MonkeyPatch,
    quick: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(workshop / "runs" / "done", tmp_path / "runs" / "done")
    _, _, err = run_main(*quick, "--out", "runs/done")
    advice = err.split("continue it with ")[1].split()

    code, _, err = run_main("simulate", *advice, "--workers", "0")

    assert advice == ["--resume", "runs/done"]
    assert code == 0, err


def test_a_run_that_another_process_holds_is_refused(
    launcher: Launcher, quick: list[str], run_main: RunMain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(launcher.folder)
    first = launcher.warm(*quick, "--out", "held", "--rounds", "500")
    metrics = launcher.folder / "held" / "metrics.jsonl"
    wait_until(lambda: line_count(metrics) >= 1, "the first round")
    names = set(tree(launcher.folder / "held"))

    code, out, err = run_main("simulate", "--resume", "held")

    assert first.running
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "held is in use by another process" in err
    committed = line_count(metrics)
    wait_until(lambda: line_count(metrics) > committed, "the first to go on")
    assert {name for name in names if ".tmp" not in name} <= set(tree(launcher.folder / "held"))
    first.kill()


def test_debug_shows_the_traceback(
    run_main: RunMain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fedtune.cli import main
    from fedtune.errors import ConfigError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fedtune", "simulate", "--set", "x=1", "--debug"])
    with pytest.raises(ConfigError):
        main()
    assert not os.listdir(tmp_path)  # noqa: PTH208  # hidden names too


def test_the_installed_command_says_it_in_one_line_too(
    launcher: Launcher, workshop: Path, tiny_base: Path
) -> None:
    command = launcher.cold(*("simulate", "--data", workshop / "null.jsonl", "--base", tiny_base))

    assert command.wait() == 2
    assert command.stdout == ""
    assert command.stderr.count("\n") == 1
    assert "null.jsonl, line 2: 'label' is empty" in command.stderr
    assert list(launcher.folder.iterdir()) == []


def test_the_rows_of_an_existing_run_are_as_they_were(workshop: Path) -> None:
    """The run that all the wrong commands had before their eyes is still a good one."""
    metrics = workshop / "runs" / "done" / "metrics.jsonl"
    assert [row["round"] for row in read_rows(metrics)] == [1, 2, 3]
