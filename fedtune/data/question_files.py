"""Questions about images, and captions of images, from files that people have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedtune.data.naming import listed, quoted
from fedtune.data.questions import NO_IMAGE, Captions, QuestionExamples
from fedtune.data.readers import place, read_cells
from fedtune.data.rows import usable
from fedtune.errors import DataError

QUESTION, ANSWER, IMAGE, CAPTION = "question", "answer", "image", "caption"


def read_questions(path: Path, answers: Sequence[str]) -> QuestionExamples:
    """The rows of a file with the columns `question`, `answer` and `image`.

    `image` is a file, relative to this one. A row may have no image, or no question, not neither.
    Raises `DataError`, also for an answer that is not one of `answers`.
    """
    code = {answer: number for number, answer in enumerate(answers)}
    files: dict[Path, int] = {}
    questions, images, labels = [], [], []
    for number, (question, answer, image) in read_cells(path, [QUESTION, ANSWER, IMAGE]):
        where = place(path, number)
        asked = question if _given(question) else ""
        if not asked and not _given(image):
            raise DataError(f"{where}: neither question nor image; fill one in, or remove the row")
        label = usable(_text(answer, ANSWER, where), ANSWER, where)
        if label not in code:
            raise DataError(
                f"{where}: the answer {quoted(label)} is not one of the given answers "
                f"({listed([quoted(name) for name in answers])})"
            )
        questions.append(usable(_text(asked, QUESTION, where), QUESTION, where) if asked else "")
        labels.append(code[label])
        images.append(NO_IMAGE)
        if _given(image):
            file = path.parent / usable(_text(image, IMAGE, where), IMAGE, where)
            images[-1] = files.setdefault(_existing(file, where), len(files))
    if not questions:
        raise DataError(f"{path} has no rows; add some or remove the file")
    return QuestionExamples(
        tuple(questions), np.array(images, np.int64), np.array(labels, np.int64), tuple(files)
    )


def read_captions(path: Path) -> Captions:
    """The rows of a file with the columns `image` and `caption`: words, as many in each row.

    Raises `DataError`.
    """
    files, words = [], []
    for number, (image, caption) in read_cells(path, [IMAGE, CAPTION]):
        where = place(path, number)
        file = path.parent / usable(_text(image, IMAGE, where), IMAGE, where)
        files.append(_existing(file, where))
        words.append(tuple(usable(_text(caption, CAPTION, where), CAPTION, where).split()))
        if len(words[-1]) != len(words[0]):
            raise DataError(
                f"{where}: a caption of {len(words[-1])} words, the first one has {len(words[0])}; "
                "each word becomes a token of its own place, so all need as many"
            )
    if not files:
        raise DataError(f"{path} has no rows; add some")
    return Captions(tuple(files), tuple(words))


def read_asked(path: Path) -> tuple[str, ...]:
    """The column `question` of a file, empty where there is none; raises `DataError`."""
    return tuple(
        _text(question, QUESTION, place(path, number)) or ""
        for number, (question,) in read_cells(path, [QUESTION])
    )


def _given(cell: object) -> bool:
    return cell is not None and bool(str(cell).strip())


def _text(cell: object, column: str, where: str) -> str | None:
    if cell is not None and not isinstance(cell, str):
        raise DataError(
            f"{where}: {column!r} is a {type(cell).__name__}, not text; put it in quotes"
        )
    return cell


def _existing(file: Path, where: str) -> Path:
    if not file.is_file():
        raise DataError(f"{where}: the image {file} does not exist")
    return file
