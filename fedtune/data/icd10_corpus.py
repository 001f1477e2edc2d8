"""How the ICD-10-CM corpus is made from the package's code tree."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.data.examples import TextExamples
from fedtune.errors import DataError

# Independent of any run's seed: everyone who reports a test figure means the same test set.
_SPLIT_SEED = 0
_PER_CATEGORY = 12
_SETS = ("test", "validation", "train")
_FEWEST = {"test": 25, "validation": 25, "train": 120}
_MOST = {"test": 50, "validation": 50, "train": 160}

MISSING = "the ICD-10 example needs simple-icd-10-cm; pip install 'fedtune[example]'"


@dataclass(frozen=True)
class Corpus:
    """The example before it is dealt out; `version` names the package that it was made from."""

    version: str
    labels: tuple[str, ...]
    train: TextExamples
    validation: TextExamples
    test: TextExamples


def build_corpus(version: str) -> Corpus:
    """The corpus from the installed package; `DataError` if it is missing. Takes seconds.

    Texts are the descriptions and inclusion terms of all codes. Three-character categories are
    shuffled; of every five, one goes to test, one to validation and three to train. A category
    gives 12 texts at most. A chapter stays if it has enough texts in every set.
    """
    texts_of, chapter_names = _read_package()
    rng = random.Random(_SPLIT_SEED)  # noqa: S311 - a split, not a secret
    categories = list(texts_of)
    rng.shuffle(categories)
    categories_of: dict[str, list[tuple[str, str]]] = {name: [] for name in _SETS}
    for i, category in enumerate(categories):
        categories_of[{0: "test", 1: "validation"}.get(i % 5, "train")].append(category)

    texts: dict[str, dict[str, list[str]]] = {name: defaultdict(list) for name in _SETS}
    seen: set[str] = set()
    for name in _SETS:  # the order says who keeps a text that occurs twice
        for category in categories_of[name]:
            new = [text for text in dict.fromkeys(texts_of[category]) if text not in seen]
            picked = rng.sample(new, min(_PER_CATEGORY, len(new)))
            seen.update(picked)
            texts[name][category[0]] += picked

    kept = sorted(
        (short_name(description), chapter)
        for chapter, description in chapter_names.items()
        if all(len(texts[name][chapter]) >= _FEWEST[name] for name in _SETS)
    )

    def examples(name: str) -> TextExamples:
        chosen = [
            rng.sample(texts[name][chapter], min(_MOST[name], len(texts[name][chapter])))
            for _, chapter in kept
        ]
        return TextExamples(
            tuple(text for of_chapter in chosen for text in of_chapter),
            np.repeat(np.arange(len(kept)), [len(of_chapter) for of_chapter in chosen]),
        )

    return Corpus(
        version,
        tuple(label for label, _ in kept),
        train=examples("train"),
        validation=examples("validation"),
        test=examples("test"),
    )


def short_name(description: str) -> str:
    """`Diseases of the nervous system (G00-G99)` as `Nervous system`."""
    name = re.sub(r"\s*\([^()]*\)$", "", description).removeprefix("Diseases of the ")
    return name[:1].upper() + name[1:]


def _read_package() -> tuple[Mapping[tuple[str, str], Sequence[str]], Mapping[str, str]]:
    """Texts by (chapter, three-character category), and descriptions by chapter."""
    try:
        import simple_icd_10_cm as icd
    except ImportError as error:
        raise DataError(MISSING) from error
    texts: dict[tuple[str, str], list[str]] = defaultdict(list)
    chapters: dict[str, str] = {}
    for code in icd.get_all_codes(True):
        if icd.is_chapter(code):
            chapters[code] = icd.get_description(code)
        elif not icd.is_block(code):
            key = icd.get_ancestors(code)[-1], code[:3]
            texts[key] += [icd.get_description(code), *icd.get_inclusion_term(code)]
    return texts, chapters
