"""The packaged example."""

import importlib.metadata
import json
import sys

import pytest

from fedtune.data import PartitionSpec, icd10_cache, icd10_corpus, label_counts, load_icd10
from fedtune.data.icd10_corpus import short_name
from fedtune.errors import ConfigError, DataError

IID = PartitionSpec("iid")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder that holds the corpus after the first test that needs it."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(cache):
    spec = PartitionSpec.parse("dirichlet:0.3")
    return load_icd10(partition=spec, clients=8, seed=0, cache_dir=cache)


def test_the_documented_counts(data):
    train = sum(label_counts(client.train, 21) for client in data.clients)
    assert len(data.labels) == 21
    assert (train == 160).all()
    assert train.sum() == 3360
    for examples, total, fewest in ((data.validation, 1022, 35), (data.test, 1021, 34)):
        counts = label_counts(examples, 21)
        assert (len(examples), counts.min(), counts.max()) == (total, fewest, 50)
    for words in ("3,360", "1,022", "1,021", "21 chapters"):
        assert words in data.source
        assert words in load_icd10.__doc__


def test_no_text_twice(data):
    train = [text for client in data.clients for text in client.train.texts]
    everything = [*train, *data.validation.texts, *data.test.texts]
    assert len(set(everything)) == len(everything)


def test_no_category_in_two_sets_and_the_right_chapter(data):
    import simple_icd_10_cm as icd

    # A wording may stand in several categories; only texts of one category tell its set.
    categories, chapters = {}, {}
    for code in icd.get_all_codes(True):
        if not (icd.is_chapter(code) or icd.is_block(code)):
            chapter = short_name(icd.get_description(icd.get_ancestors(code)[-1]))
            for text in (icd.get_description(code), *icd.get_inclusion_term(code)):
                categories.setdefault(text, set()).add(code[:3])
                chapters.setdefault(text, set()).add(chapter)
    sets = [[c.train for c in data.clients], [data.validation], [data.test]]
    held = []
    for examples in sets:
        rows = [r for e in examples for r in zip(e.texts, e.labels.tolist(), strict=True)]
        assert all(data.labels[label] in chapters[text] for text, label in rows)
        texts = [text for text, _ in rows if len(categories[text]) == 1]
        held.append({category for text in texts for category in categories[text]})
    train, validation, test = held
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_a_text_of_several_categories_stays_in_one_set(monkeypatch):
    # 200 categories that share a text with every neighbour and one with all others.
    texts = {
        ("1", f"C{i}"): ["everywhere", *(f"text {j}" for j in range(9 * i, 9 * i + 10))]
        for i in range(200)
    }
    monkeypatch.setattr(icd10_corpus, "_read_package", lambda: (texts, {"1": "One", "2": "Few"}))
    monkeypatch.setattr(icd10_corpus, "_MOST", {"train": 900, "validation": 300, "test": 300})
    corpus = icd10_corpus.build_corpus("some version")
    assert corpus.labels == ("One",)
    train, validation, test = (
        set(examples.texts) for examples in (corpus.train, corpus.validation, corpus.test)
    )
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_labels_read_well(data):
    assert "Circulatory system" in data.labels
    assert "Certain infectious and parasitic diseases" in data.labels
    assert list(data.labels) == sorted(data.labels)
    assert not any("(" in label for label in data.labels)


@pytest.mark.parametrize(
    ("description", "name"),
    [
        ("Diseases of the eye and adnexa (H00-H59)", "Eye and adnexa"),
        ("Neoplasms (C00-D49)", "Neoplasms"),
        ("Pregnancy (x) and so on", "Pregnancy (x) and so on"),
    ],
)
def test_short_name(description, name):
    assert short_name(description) == name


def test_the_seed_moves_training_texts_only(data, cache):
    spec = PartitionSpec.parse("dirichlet:0.3")
    again = load_icd10(partition=spec, clients=8, seed=0, cache_dir=cache)
    other = load_icd10(partition=spec, clients=8, seed=1, cache_dir=cache)
    texts = [[c.train.texts for c in d.clients] for d in (data, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert data.test.texts == again.test.texts == other.test.texts
    assert [c.name for c in data.clients] == [f"hospital-{i}" for i in range(1, 9)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("Neoplasms", "Neoplasmata", 1),
        lambda text: "[]",
        lambda text: json.dumps({"sha256": 0}),
        lambda text: "[" * 100_000,
    ],
    ids=["half", "changed", "other", "no corpus", "deep"],
)
def test_a_broken_cache_is_rebuilt(data, cache, tmp_path, damage):
    (good,) = cache.iterdir()
    assert importlib.metadata.version("simple-icd-10-cm") in good.name
    (tmp_path / good.name).write_text(damage(good.read_text()))
    load_icd10(partition=IID, clients=2, seed=0, cache_dir=tmp_path)
    assert (tmp_path / good.name).read_text() == good.read_text()
    assert len(list(tmp_path.iterdir())) == 1  # nothing half-written is left


def test_the_cache_is_used(data, cache, monkeypatch):
    monkeypatch.setattr(icd10_cache, "build_corpus", lambda version: pytest.fail("built again"))
    load_icd10(partition=IID, clients=2, seed=0, cache_dir=cache)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    (cache.parent / "fedtune").symlink_to(cache)
    load_icd10(partition=IID, clients=2, seed=0)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    data = load_icd10(partition=IID, clients=2, seed=0, cache_dir=tmp_path / "file/cache")
    assert len(data.labels) == 21


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "simple_icd_10_cm", None)
    with pytest.raises(DataError, match=r"pip install 'fedtune\[example\]'"):
        load_icd10(partition=IID, clients=2, seed=0, cache_dir=tmp_path)

    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    with pytest.raises(DataError, match=r"pip install 'fedtune\[example\]'"):
        load_icd10(partition=IID, clients=2, seed=0, cache_dir=tmp_path)


def test_refusals(cache):
    with pytest.raises(ConfigError, match="no columns for column:ward"):
        load_icd10(partition=PartitionSpec("column", column="ward"), clients=2, seed=0)
    with pytest.raises(DataError, match="clients <= 3360"):
        load_icd10(partition=IID, clients=4000, seed=0, cache_dir=cache)
