"""Questions and captions from a person's own files: what is read, and what is refused where."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.data.question_files import read_captions, read_questions
from fedtune.data.questions import NO_IMAGE
from fedtune.errors import DataError

ANSWERS = ("no", "yes")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).write_bytes(b"an image")
    return tmp_path


def write(folder: Path, text: str, name: str = "rows.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_rows_with_and_without_image_or_question(folder: Path) -> None:
    path = write(
        folder,
        "answer,question,image\nyes,is it so?,images/b.png\nno,and alone?,\n"
        "no,,images/a.png\nyes,again?,images/b.png\n",
    )
    found = read_questions(path, ANSWERS)
    assert found.questions == ("is it so?", "and alone?", "", "again?")
    assert found.labels.tolist() == [1, 0, 0, 1]
    assert found.images.tolist() == [0, NO_IMAGE, 1, 0]
    assert found.files == (folder / "images/b.png", folder / "images/a.png")


def test_json_lines_read_alike(folder: Path) -> None:
    text = '{"question": "so?", "answer": "yes", "image": null}\n'
    found = read_questions(write(folder, text, "rows.jsonl"), ANSWERS)
    assert (found.questions, found.images.tolist()) == (("so?",), [NO_IMAGE])


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("perhaps,so?,images/a.png", "line 2: the answer 'perhaps' is not one of"),
        (",so?,images/a.png", "line 2: 'answer' is empty"),
        ("yes,,", "line 2: neither question nor image"),
        ("yes,so?,images/c.png", "line 2: the image .*c.png does not exist"),
        ("yes,so?,images", "line 2: the image .*images does not exist"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(folder: Path, row: str, what: str) -> None:
    with pytest.raises(DataError, match=what):
        read_questions(write(folder, f"answer,question,image\n{row}\n"), ANSWERS)


def test_numbers_are_not_taken_for_texts(folder: Path) -> None:
    text = '{"question": 3, "answer": "yes", "image": null}\n'
    with pytest.raises(DataError, match="line 1: 'question' is a int, not text"):
        read_questions(write(folder, text, "rows.jsonl"), ANSWERS)


def test_a_file_without_rows_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="has no rows"):
        read_questions(write(folder, "answer,question,image\n"), ANSWERS)


def test_captions_have_as_many_words_in_each_row(folder: Path) -> None:
    text = "image,caption\nimages/a.png,red circle\nimages/b.png,  blue   square \n"
    found = read_captions(write(folder, text))
    assert found.words == (("red", "circle"), ("blue", "square"))
    kept, apart = found.split(0.1, 0)
    assert (len(kept), len(apart)) == (1, 1)
    assert {*kept.files, *apart.files} == set(found.files)
    with pytest.raises(DataError, match="line 3: a caption of 1 words, the first one has 2"):
        read_captions(write(folder, "image,caption\nimages/a.png,red circle\nimages/b.png,blue\n"))
