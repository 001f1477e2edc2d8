"""Files in three formats: what is read, and every way in which one can be wrong."""

import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from fedtune.data.readers import MAX_CSV_FIELD
from fedtune.data.rows import Columns, read_rows, require_rows
from fedtune.errors import DataError

COLUMNS = Columns("text", "label")


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parquet(folder, **columns):
    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def read(path, columns=COLUMNS):
    rows = read_rows(path, columns)
    return list(zip(rows.numbers, rows.texts, rows.labels, strict=True))


def test_jsonl(tmp_path):
    path = write(
        tmp_path,
        "a.JSONL",
        b'\xef\xbb\xbf{"text": "caf\\u00e9 \\u2028 x", "label": "a", "more": []}\r\n\n  \n'
        b'{"label": 3, "text": " \\u0000\\tkept \\ud83d\\ude00 "}\n{"text": "t", "label": true}',
    )
    assert read(path) == [
        (1, "café \u2028 x", "a"),
        (4, " \x00\tkept 😀 ", "3"),
        (5, "t", "true"),
    ]


def test_csv(tmp_path):
    text = '\ufefflabel,text,site\r\na,"one,\n""two""",s\r\n\r\nTrue, e\u0301 ,t\r\n'
    path = write(tmp_path, "a.csv", text)
    assert read(path) == [(2, 'one,\n"two"', "a"), (5, " e\u0301 ", "True")]
    assert read_rows(path, Columns("text", "label", "site")).clients == ("s", "t")


def test_csv_field_longer_than_pythons_default_limit(tmp_path):
    path = write(tmp_path, "a.csv", f"text,label\n{'x' * 200_000},a\n")
    assert len(read_rows(path, COLUMNS).texts[0]) == 200_000


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pyarrow.array(["a", "b"]), ["a", "b"]),
        (pyarrow.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
        (pyarrow.array([7, 10], pyarrow.int16()), ["7", "10"]),
        (pyarrow.array([True, False]), ["true", "false"]),
    ],
    ids=["string", "categorical", "int16", "bool"],
)
def test_parquet(tmp_path, labels, expected):
    path = parquet(tmp_path, label=labels, text=["x", "y"])
    assert read(path) == [(1, "x", expected[0]), (2, "y", expected[1])]


def test_parquet_rows_are_counted_over_batches(tmp_path):
    count = 70_000  # a batch has 65,536 rows
    path = parquet(tmp_path, text=["x"] * (count - 1) + [None], label=["a"] * count)
    with pytest.raises(DataError, match=r"row 70000: 'text' is empty"):
        read(path)


GOOD = '{"text": "t", "label": "a"}\n'
WRONG = [  # name, content, where, what
    ("a.jsonl", GOOD.encode() + b'{"text": "\xff"}', "line 2", "byte 11 is not UTF-8"),
    ("a.jsonl", GOOD + "\n{text}", "line 3", "invalid JSON"),
    ("a.jsonl", "[" * 100_000, "line 1", "invalid JSON"),
    ("a.jsonl", '{"text": "t", "label": ' + "1" * 5000 + "}", "line 1", "invalid JSON"),
    ("a.jsonl", GOOD + '["t", "a"]', "line 2", "not a JSON object"),
    ("a.jsonl", GOOD + '{"txt": "t", "label": "a"}', "line 2", "did you mean 'txt'"),
    ("a.jsonl", GOOD + "{}", "line 2", "there are none"),
    ("a.jsonl", '{"text": null, "label": "a"}', "line 1", "'text' is empty"),
    ("a.jsonl", '{"text": " \\n", "label": "a"}', "line 1", "'text' is empty"),
    ("a.jsonl", '{"text": "t", "label": ""}', "line 1", "'label' is empty"),
    ("a.jsonl", '{"text": "t", "label": null}', "line 1", "'label' is empty"),
    ("a.jsonl", '{"text": 5, "label": "a"}', "line 1", "'text' is a int, not text"),
    ("a.jsonl", '{"text": "t", "label": 1.5}', "line 1", "'label' is a float"),
    ("a.jsonl", '{"text": "t", "label": ["a"]}', "line 1", "'label' is a list"),
    ("a.jsonl", '{"text": "t\\ud800", "label": "a"}', "line 1", "lone surrogate at character 2"),
    ("a.csv", b"text,label\nt,a\n\xe9,b\n", "line 3", "not UTF-8"),
    ("a.csv", "text,labels\nt,a\n", "line 1", "there are 'text', 'labels'; did you mean 'labels'"),
    ("a.csv", "text,text,label\nt,t,a\n", "line 1", "same name"),
    ("a.csv", 'text,label\n"x\ny",a\n\nt,a,b\n', "line 5", "3 cells, but the header has 2"),
    ("a.csv", 'text,label\nt,a\n"open,b\nc,d\n', "line 3", "invalid CSV"),
    ("a.csv", "text,label\nt,\n", "line 2", "'label' is empty"),
    ("a.csv", f"text,label\nt,a\n{'x' * (MAX_CSV_FIELD + 1)},a\n", "line 3", "field limit"),
    ("a.parquet", "PAR1 not really", "a.parquet", "not a readable parquet file"),
    ("a.txt", "t", "a.txt", ".jsonl, .csv, .parquet"),
]


@pytest.mark.parametrize(("name", "content", "where", "what"), WRONG, ids=[w[3] for w in WRONG])
def test_wrong_files(tmp_path, name, content, where, what):
    path = write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        read(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert where in text
    assert what in text
    assert "\n" not in text


def test_parquet_without_the_column(tmp_path):
    with pytest.raises(DataError, match=r"there are 'text', 'lable'; did .*'lable'"):
        read(parquet(tmp_path, text=["x"], lable=["a"]))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    path = parquet(tmp_path, text=["x"], label=["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'fedtune\[parquet\]'"):
        read(path)


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(DataError, match=r"a\.csv does not exist"):
        read(tmp_path / "a.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match=r"folder\.csv is not a file"):
        read(tmp_path / "folder.csv")


@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", ""), ("a.csv", "text,label\n\n"), ("a.jsonl", "\n\n")]
)
def test_files_without_rows(tmp_path, name, content):
    rows = read_rows(write(tmp_path, name, content), COLUMNS)
    assert len(rows) == 0
    with pytest.raises(DataError, match="has no rows"):
        require_rows(rows)


def test_long_values_are_cut_in_errors(tmp_path):
    path = write(tmp_path, "a.jsonl", json.dumps({"text": "t", "label": "l" * 5000}))
    with pytest.raises(DataError) as caught:
        read_rows(path, COLUMNS).encode({"a": 0})
    assert len(str(caught.value)) < 300 + len(str(path))
