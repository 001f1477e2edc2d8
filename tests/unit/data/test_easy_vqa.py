"""The packaged example against the package's own functions: who has what, and what nobody has."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import easy_vqa
import numpy as np
import pytest

from fedtune.data import PartitionSpec
from fedtune.data.easy_vqa import KINDS, PUBLIC_IMAGES, kind_of, load_easy_vqa, public_captions
from fedtune.data.questions import FederatedQuestions
from fedtune.errors import ConfigError, DataError


def load(partition: str = "dirichlet:0.5", clients: int = 8, seed: int = 0) -> FederatedQuestions:
    return load_easy_vqa(partition=PartitionSpec.parse(partition), clients=clients, seed=seed)


@pytest.fixture(scope="module")
def data() -> FederatedQuestions:
    return load()


def rows(examples: object) -> list[tuple[str, int, int]]:
    return list(zip(examples.questions, examples.labels, examples.images, strict=True))


def test_every_question_is_the_packages_with_its_answer_and_image(data: FederatedQuestions) -> None:
    for examples, (questions, answers, images), paths in (
        (data.test, easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()),
        *(
            (c.train, easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths())
            for c in data.clients
        ),
    ):
        known = set(zip(questions, answers, images, strict=True))
        for question, label, image in rows(examples):
            assert (question, data.answers[label], image) in known
        for image in set(examples.images.tolist()):
            assert examples.files[image] == Path(paths[image])
    assert sorted(data.answers) == sorted(easy_vqa.get_answers())


def test_no_image_is_at_two_sites_or_public(data: FederatedQuestions) -> None:
    owned = [set(client.train.images.tolist()) for client in data.clients]
    assert sum(map(len, owned)) == len(set().union(*owned))
    assert min(map(min, owned)) >= PUBLIC_IMAGES
    assert {file.parent.parent.name for file in data.public.files} == {"train"}
    assert max(int(file.stem) for file in data.public.files) < PUBLIC_IMAGES
    assert {file.parent.parent.name for file in data.test.files} == {"test"}


def test_captions_are_the_answers_to_colour_and_shape(data: FederatedQuestions) -> None:
    questions, answers, images = easy_vqa.get_train_questions()
    told = {(image, answer) for answer, image in zip(answers, images, strict=True)}
    for file, (colour, shape) in zip(data.public.files, data.public.words, strict=True):
        assert {(int(file.stem), colour), (int(file.stem), shape)} <= told
    assert len(questions) == 38_575
    assert public_captions() == data.public


def test_iid_sites_keep_all_questions_of_their_images() -> None:
    data = load("iid", clients=3)
    _, _, images = easy_vqa.get_train_questions()
    asked = Counter(images)
    for client in data.clients:
        assert Counter(client.train.images.tolist()) == {
            image: asked[image] for image in set(client.train.images.tolist())
        }


def test_dirichlet_is_uneven_in_colours_and_in_kinds_of_questions(data: FederatedQuestions) -> None:
    def spread(found: FederatedQuestions) -> tuple[float, float]:
        words = {
            image: answer
            for _, answer, image in zip(*easy_vqa.get_train_questions(), strict=True)
            if kind_of(answer) == "colour"
        }
        colours, kinds = [], []
        for client in found.clients:
            images = set(client.train.images.tolist())
            count = Counter(words[image] for image in images)
            colours.append(max(count.values()) / len(images))
            asked = Counter(kind_of(found.answers[label]) for label in client.train.labels)
            kinds.append([asked[kind] / len(client.train) for kind in KINDS])
        return float(np.mean(colours)), float(np.std(kinds, axis=0).max())

    even, uneven = spread(load("iid")), spread(data)
    assert even[0] < 0.2  # of eight colours
    assert uneven[0] > 0.35
    assert even[1] < 0.02
    assert uneven[1] > 0.1


def test_the_seed_deals_and_leaves_the_test_set_alone() -> None:
    one, same, other = load(), load(), load(seed=1)
    assert [rows(c.train) for c in one.clients] == [rows(c.train) for c in same.clients]
    assert [rows(c.train) for c in one.clients] != [rows(c.train) for c in other.clients]
    assert rows(one.test) == rows(other.test)
    assert len(one.test) == 600
    assert set(Counter(one.test.images.tolist()).values()) == {3}


def test_what_cannot_be_dealt_is_refused() -> None:
    with pytest.raises(ConfigError, match="no columns for column:kind"):
        load("column:kind")
    with pytest.raises(DataError, match=r"site-\d has \d+ questions, fewer than.*= 9000"):
        load_easy_vqa(partition=PartitionSpec.parse("iid"), clients=8, seed=0, min_size=9000)
