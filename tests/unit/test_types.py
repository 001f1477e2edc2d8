"""Digests against published SHA-256 vectors; manifests as exact inverses."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.types import Manifest, digest_of, sha256_hex

SHAPES = st.lists(st.integers(1, 4), max_size=3).map(tuple)
MANIFESTS = st.lists(SHAPES, min_size=1, max_size=5).map(
    lambda shapes: Manifest.of((f"t{i}", shape) for i, shape in enumerate(shapes))
)


def test_sha256_of_fips_180_vectors():
    assert sha256_hex(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_hex(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_digest_is_that_of_canonical_json():
    value = {"b": [1, 2.5], "a": "é"}
    text = b'{"a":"\\u00e9","b":[1,2.5]}'
    assert digest_of(value) == hashlib.sha256(text).hexdigest()
    assert digest_of(dict(reversed(value.items()))) == digest_of(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_digest_refuses_what_json_does_not_have(value):
    with pytest.raises(ValueError, match="JSON"):
        digest_of([value])


@given(MANIFESTS)
def test_split_and_join_are_inverse(manifest):
    vector = np.arange(manifest.size, dtype=np.float32)
    parts = manifest.split(vector)
    assert sum(part.size for part in parts.values()) == manifest.size
    assert np.array_equal(manifest.join(dict(reversed(parts.items()))), vector)


def test_split_follows_the_order_of_the_tensors_and_gives_views():
    manifest = Manifest.of([("b", (2, 2)), ("a", (3,))])
    vector = np.arange(7, dtype=np.float32)
    parts = manifest.split(vector)
    assert list(parts) == ["b", "a"]
    assert parts["b"].tolist() == [[0, 1], [2, 3]]
    assert parts["a"].tolist() == [4, 5, 6]
    parts["b"][1, 0] = 9
    assert vector[2] == 9


def test_join_refuses_other_names_and_shapes():
    manifest = Manifest.of([("a", (2,))])
    for tensors in ({}, {"a": np.zeros(2), "b": np.zeros(1)}, {"c": np.zeros(2)}):
        with pytest.raises(ValueError, match="names"):
            manifest.join(tensors)
    for shape in ((1,), (2, 1), ()):  # what numpy would broadcast is no adapter either
        with pytest.raises(ValueError, match="shape"):
            manifest.join({"a": np.zeros(shape, np.float32)})


def test_digest_of_a_manifest_depends_on_names_shapes_and_order():
    kinds = [
        [("a", (2, 3)), ("b", (4,))],
        [("b", (4,)), ("a", (2, 3))],
        [("a", (3, 2)), ("b", (4,))],
        [("a", (2, 3)), ("c", (4,))],
        [("a", (2, 3))],
        [("a", (6,)), ("b", (4,))],
    ]
    assert len({Manifest.of(kind).digest for kind in kinds}) == len(kinds)
    assert Manifest.of(kinds[0]).digest == sha256_hex(b'[["a",[2,3]],["b",[4]]]')
