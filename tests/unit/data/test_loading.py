"""`load_path`: folders of clients, single files, labels and warnings."""

import csv
import json

import numpy as np
import pytest

from fedtune.data import FederatedData, PartitionSpec, load_path
from fedtune.errors import ConfigError, DataError


def write(path, rows, **more):
    """A jsonl file of `(text, label)` pairs or whole records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [row if isinstance(row, dict) else {"text": row[0], "label": row[1]} for row in rows]
    path.write_text("".join(json.dumps(record | more) + "\n" for record in records))
    return path


def load(path, spec=None, clients=None, seed=0, **more) -> FederatedData:
    parsed = None if spec is None else PartitionSpec.parse(spec)
    return load_path(path, partition=parsed, clients=clients, seed=seed, **more)


def pairs(examples, labels):
    return [(t, labels[y]) for t, y in zip(examples.texts, examples.labels, strict=True)]


def rows_of(*labels, start=0):
    return [(f"text {i} of {label}", label) for i, label in enumerate(labels, start)]


@pytest.fixture
def folder(tmp_path):
    """Two clients, one of them with a test set, and a common test set."""
    write(tmp_path / "north/train.jsonl", rows_of("a", "b", "a"))
    write(tmp_path / "north/test.jsonl", rows_of("b", start=10))
    write(tmp_path / ".cache/train.jsonl", rows_of("hidden"))
    (tmp_path / "east").mkdir()
    with (tmp_path / "east/train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), ("x", "b"), ("y", "c"), ("z", "a")])
    write(tmp_path / "test.jsonl", rows_of("c", "a", start=20))
    (tmp_path / "README.md").write_text("not data")
    return tmp_path


def test_folder(folder):
    data = load(folder)
    assert data.labels == ("a", "b", "c")
    east, north = data.clients
    assert (east.name, north.name) == ("east", "north")
    assert pairs(east.train, data.labels) == [("x", "b"), ("y", "c"), ("z", "a")]
    assert pairs(north.train, data.labels) == rows_of("a", "b", "a")
    assert pairs(north.test, data.labels) == rows_of("b", start=10)
    assert east.test is None
    assert pairs(data.test, data.labels) == rows_of("c", "a", start=20)
    assert data.validation is None
    assert data.warnings == ("1 of 2 clients hold only some of the 3 labels (north: 2)",)
    for part in (
        "2 client folders",
        "6 training rows",
        "2 common test",
        "1 test rows at 1 clients",
    ):
        assert part in data.source


def test_folder_without_any_test(tmp_path):
    write(tmp_path / "a/train.jsonl", rows_of("x", "y"))
    data = load(tmp_path, clients=1)
    assert data.test is None
    assert data.warnings == ()
    assert "no test rows" in data.source


def test_unusable_client_folders_are_left_out_with_a_warning(folder):
    write(folder / "empty/train.jsonl", [])
    (folder / "docs").mkdir()
    data = load(folder)
    assert [client.name for client in data.clients] == ["east", "north"]
    assert data.warnings[0] == (
        "2 client folders are left out: docs has no train file, empty has no rows in train.jsonl"
    )
    with pytest.raises(DataError, match=r"has 2 client folders .*empty has no rows.*, not 4"):
        load(folder, clients=4)


def test_wrong_folders(folder, tmp_path):
    with pytest.raises(ConfigError, match="folder of clients and cannot be partitioned by iid"):
        load(folder, "iid")
    with pytest.raises(DataError, match="2 client folders with training rows, not 3"):
        load(folder, clients=3)
    with pytest.raises(DataError, match=r"east/train.csv has 3 rows.*minimum of 4"):
        load(folder, min_size=4)
    with pytest.raises(DataError, match="no client folder with training rows"):
        load(folder / "north")
    (folder / "north/train.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"train\.csv, train\.jsonl; keep one"):
        load(folder)
    (folder / "north/train.csv").unlink()
    (folder / "north/train.jsonl").rename(folder / "north/train.json")
    with pytest.raises(DataError, match=r"train\.json is of no known kind"):
        load(folder)
    with pytest.raises(DataError, match="does not exist"):
        load(tmp_path / "nothing.csv")


def test_given_labels(folder):
    assert load(folder, labels=["c", "z", "b", "a"]).labels == ("c", "z", "b", "a")
    with pytest.raises(DataError, match=r"train\.csv, line 3: the label 'c' is not one of"):
        load(folder, labels=["a", "b"])
    for wrong in ([], ["a", "a"]):
        with pytest.raises(DataError, match="each label once"):
            load(folder, labels=wrong)


def test_integer_labels_are_sorted_by_number(tmp_path):
    path = write(tmp_path / "a.jsonl", [(f"t{i}", [10, 9, -1][i % 3]) for i in range(30)])
    assert load(path, clients=2).labels == ("-1", "9", "10")
    write(path, [(f"t{i}", [10, 9, "x"][i % 3]) for i in range(30)])
    assert load(path, clients=2).labels == ("10", "9", "x")


def test_file_is_split_before_it_is_dealt_out(tmp_path):
    path = write(tmp_path / "notes.jsonl", rows_of(*"ab" * 50))
    write(tmp_path / "test.jsonl", rows_of("unrelated"))
    data = load(path)
    assert [client.name for client in data.clients] == [f"client-{i}" for i in range(1, 9)]
    assert [len(client.train) for client in data.clients] == [10] * 8
    assert np.bincount(data.test.labels).tolist() == [10, 10]
    everything = [p for c in data.clients for p in pairs(c.train, data.labels)]
    assert sorted(everything + pairs(data.test, data.labels)) == sorted(rows_of(*"ab" * 50))
    assert "80 training rows for 8 clients by iid, 20 held out as test rows" in data.source
    same, other = load(path), load(path, seed=1)
    assert [c.train.texts for c in same.clients] == [c.train.texts for c in data.clients]
    assert other.test.texts != data.test.texts


def test_train_file_takes_the_test_file_beside_it(tmp_path):
    path = write(tmp_path / "train.jsonl", rows_of(*"ab" * 8))
    (tmp_path / "test.csv").write_text("text,label\nfresh,c\n")
    data = load(path, "shards:2", 2)
    assert sum(len(client.train) for client in data.clients) == 16
    assert pairs(data.test, data.labels) == [("fresh", "c")]
    assert "1 test rows from test.csv" in data.source
    assert "1 test labels are trained by no client ('c')" in data.warnings
    (tmp_path / "test.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"test\.csv has no rows"):
        load(path)


def test_column(tmp_path):
    rows = [{"text": f"t{i}", "label": "ab"[i % 2], "ward": 10 - i % 3 * 4} for i in range(30)]
    path = write(tmp_path / "a.jsonl", rows)
    data = load(path, "column:ward")
    assert [client.name for client in data.clients] == ["2", "6", "10"]
    for client in data.clients:
        wards = {row["ward"] for row in rows if row["text"] in client.train.texts}
        assert wards == {int(client.name)}
    assert len(load(path, "column:ward", 3).clients) == 3
    with pytest.raises(DataError, match="3 distinct values, but 4 clients"):
        load(path, "column:ward", 4)
    with pytest.raises(DataError, match=r"line 1: no column 'word'.*did you mean 'ward'"):
        load(path, "column:word")


def test_no_client_of_a_column_is_held_out_whole(tmp_path):
    rows = [{"text": f"t{i}", "label": "a", "ward": f"w{i // 2}"} for i in range(20)]
    path = write(tmp_path / "a.jsonl", rows)
    for seed in range(10):
        assert len(load(path, "column:ward", seed=seed, test_fraction=0.5).clients) == 10


def test_other_column_names(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"note": f"n{i}", "code": i % 2} for i in range(20)])
    data = load(path, clients=2, text_column="note", label_column="code")
    assert data.labels == ("0", "1")


def test_too_many_clients(tmp_path):
    path = write(tmp_path / "a.jsonl", rows_of(*"ab" * 5))
    with pytest.raises(DataError, match=r"8 training rows .* 9 clients .*clients <= 8"):
        load(path, clients=9)
    with pytest.raises(DataError, match=r"a\.jsonl has no rows"):
        load(write(path, []))


def test_warnings(tmp_path):
    long = "x" * 20_001
    write(tmp_path / "a/train.jsonl", [("t", "p"), ("t", "p"), ("t", "q"), (long, "q")])
    write(tmp_path / "b/train.jsonl", [("u", "q"), ("u", "q"), ("u", "q")])
    write(tmp_path / "b/test.jsonl", [("v", "r"), ("t", "p")])
    assert load(tmp_path).warnings == (
        "2 of 2 clients hold only some of the 3 labels (a: 2, b: 1)",
        "1 of 2 clients hold one label only (b: 'q')",
        "3 training rows repeat a row of the same client",
        "1 texts are longer than 20,000 characters; the tokenizer will cut them",
        "1 test labels are trained by no client ('r')",
        "1 test rows have a text that is also trained on; the test is too easy",
    )
