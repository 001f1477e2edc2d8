"""`load_easy_vqa`: the packaged example of questions about images.

easy-VQA (Victor Zhou 2019) has 5,000 generated images of 64 × 64 pixels, each of one shape in one
colour, and some ten questions about each, with 13 answers. They come with the package `easy-vqa`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedtune.data.naming import listed
from fedtune.data.partitioners import partition as deal
from fedtune.data.questions import (
    Captions,
    FederatedQuestions,
    QuestionClient,
    QuestionExamples,
)
from fedtune.data.spec import PartitionSpec
from fedtune.errors import ConfigError, DataError

MISSING = "the easy-VQA example needs easy-vqa; pip install 'fedtune[vqa]'"
PUBLIC_IMAGES = 800  # the first ones of the training images: nobody's own
TEST_QUESTIONS = 600  # of the first images of the test set, three of each
_PER_TEST_IMAGE = 3
KINDS = ("yes or no", "shape", "colour")
_SHAPES = frozenset({"circle", "rectangle", "triangle"})
_YES_NO = frozenset({"yes", "no"})


@dataclass(frozen=True)
class _Split:
    files: tuple[Path, ...]
    rows: tuple[tuple[str, str, int], ...]  # question, answer, place of the image

    def words(self) -> dict[int, tuple[str, str]]:
        """Colour and shape of each image of which both were asked."""
        found: dict[int, dict[str, str]] = {}
        for _, answer, image in self.rows:
            if answer not in _YES_NO:
                found.setdefault(image, {})[_kind(answer)] = answer
        return {
            image: (words["colour"], words["shape"])
            for image, words in found.items()
            if len(words) == 2
        }


def load_easy_vqa(
    *, partition: PartitionSpec, clients: int, seed: int, min_size: int = 1
) -> FederatedQuestions:
    """easy-VQA, its training images dealt out to `site-1` and so on with all their questions.

    The first 800 training images are public, with their captions (colour and shape); the clients
    have those of the other 3,200 of which the colour was asked. A `dirichlet:ALPHA` partition is
    uneven in two ways: images go by their colours, and of its questions each client keeps the
    three kinds (yes or no, shape, colour) in proportions drawn from the same distribution. The
    test set is 600 questions about 200 images of easy-VQA's own test set, whatever the seed.

    Raises `DataError` if the package is missing or the partition leaves a client with fewer than
    `min_size` questions; `ConfigError` for a `column:` partition.
    """
    if partition.kind == "column":
        raise ConfigError(f"easy-VQA has no columns for {partition}; use iid, dirichlet or shards")
    answers, train, test = _read_package()
    code = {answer: place for place, answer in enumerate(answers)}
    words = train.words()
    private = sorted(image for image in words if image >= PUBLIC_IMAGES)
    colours = sorted({words[image][0] for image in private})
    of_image = np.array([colours.index(words[image][0]) for image in private])
    rows_of: dict[int, list[int]] = {image: [] for image in private}
    for row, (_, _, image) in enumerate(train.rows):
        if image in rows_of:
            rows_of[image].append(row)
    everything = _examples(train, range(len(train.rows)), code)
    rng = np.random.default_rng([seed, 1])
    members = []
    for number, part in enumerate(deal(of_image, partition, clients, seed), 1):
        rows = np.array([row for place in part for row in rows_of[private[int(place)]]], np.int64)
        if partition.alpha is not None:
            rows = rows[_kept([train.rows[row][1] for row in rows], partition.alpha, rng)]
        if len(rows) < min_size:
            raise DataError(
                f"site-{number} has {len(rows)} questions, fewer than data.min-examples = "
                f"{min_size}; use a larger ALPHA in data.partition, or fewer data.clients"
            )
        members.append(QuestionClient(f"site-{number}", everything.select(rows)))
    total = sum(len(member.train) for member in members)
    return FederatedQuestions(
        answers,
        tuple(members),
        _test(test, code),
        _captions(train),
        tuple(_warnings(answers, members)),
        f"easy-VQA ({importlib.metadata.version('easy-vqa')}), questions about an image of a "
        f"coloured shape: {total:,} training questions for {clients} sites by {partition}, "
        f"{TEST_QUESTIONS} for testing, {len(answers)} answers",
        tuple(sorted({asked for asked, _, image in train.rows if image < PUBLIC_IMAGES})),
    )


def public_captions() -> Captions:
    """The public images, with what is on them; raises `DataError` if the package is missing."""
    return _captions(_read_package()[1])


def kind_of(answer: str) -> str:
    """The kind of question that has this answer, one of `KINDS`."""
    return "yes or no" if answer in _YES_NO else _kind(answer)


def _captions(train: _Split) -> Captions:
    words = train.words()
    public = sorted(image for image in words if image < PUBLIC_IMAGES)
    return Captions(
        tuple(train.files[image] for image in public), tuple(words[image] for image in public)
    )


def _kind(answer: str) -> str:
    return "shape" if answer in _SHAPES else "colour"


def _kept(answers: list[str], alpha: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Which rows are left if each kind is thinned to a share of its own, the largest whole."""
    shares = rng.dirichlet([alpha] * len(KINDS))
    chance = dict(zip(KINDS, shares / shares.max(), strict=True))
    return np.array(
        [row for row, answer in enumerate(answers) if rng.random() < chance[kind_of(answer)]],
        np.int64,
    )


def _test(split: _Split, code: dict[str, int]) -> QuestionExamples:
    """Of each of the first images three questions, so that all kinds are as frequent as ever."""
    rng = np.random.default_rng(0)  # independent of any run's seed: one test set for all
    images = sorted({image for _, _, image in split.rows})[: TEST_QUESTIONS // _PER_TEST_IMAGE]
    rows_of: dict[int, list[int]] = {image: [] for image in images}
    for row, (_, _, image) in enumerate(split.rows):
        if image in rows_of:
            rows_of[image].append(row)
    chosen = [
        int(row)
        for rows in rows_of.values()
        for row in rng.choice(rows, _PER_TEST_IMAGE, replace=False)
    ]
    return _examples(split, chosen, code)


def _examples(split: _Split, rows: Iterable[int], code: dict[str, int]) -> QuestionExamples:
    chosen = [split.rows[row] for row in rows]
    return QuestionExamples(
        tuple(question for question, _, _ in chosen),
        np.array([image for _, _, image in chosen], np.int64),
        np.array([code[answer] for _, answer, _ in chosen], np.int64),
        split.files,
    )


def _warnings(answers: tuple[str, ...], members: list[QuestionClient]) -> Iterable[str]:
    some = [
        f"{member.name}: {held}"
        for member in members
        if (held := len(np.unique(member.train.labels))) < len(answers)
    ]
    if some:
        yield (
            f"{len(some)} of {len(members)} clients hold only some of the {len(answers)} answers "
            f"({listed(some)})"
        )


def _read_package() -> tuple[tuple[str, ...], _Split, _Split]:
    """Answers, training set and test set; read without importing, as the data of a package."""
    found = importlib.util.find_spec("easy_vqa")
    if found is None or found.origin is None:
        raise DataError(MISSING)
    folder = Path(found.origin).parent / "data"
    try:
        answers = tuple(sorted((folder / "answers.txt").read_text("utf-8").split()))
        splits = [_read_split(folder / name) for name in ("train", "test")]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{folder}: not the data of easy-vqa 1.0: {error}") from error
    return answers, splits[0], splits[1]


def _read_split(folder: Path) -> _Split:
    rows = json.loads((folder / "questions.json").read_text("utf-8"))
    images = 1 + max(int(image) for _, _, image in rows)
    return _Split(
        tuple(folder / "images" / f"{image}.png" for image in range(images)),
        tuple((str(question), str(answer), int(image)) for question, answer, image in rows),
    )
