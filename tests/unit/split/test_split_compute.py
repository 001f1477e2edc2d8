"""What shares a batch gets what it would get alone."""

from __future__ import annotations

import numpy as np
import pytest
from split_service import some_examples

from fedtune.base.answering import AnsweringDecoder
from fedtune.split.compute import Work, compute
from fedtune.train.cut import InProcessBase
from fedtune.wire.split import Kind

NONE = np.zeros(0, np.int64)


def _work(kind: Kind, seed: int, count: int, width: int, longest: int) -> Work:
    embeddings, lengths, labels = some_examples(seed, count, width, longest)
    counted = np.arange(longest) < lengths[:, None]
    return Work(kind, embeddings[counted], lengths, labels if kind == Kind.DIFFERENTIATE else NONE)


def _padded(work: Work) -> np.ndarray:
    found = np.zeros((len(work.lengths), work.longest, work.tokens.shape[1]), np.float32)
    found[np.arange(work.longest) < work.lengths[:, None]] = work.tokens
    return found


@pytest.mark.parametrize(
    "kinds",
    [
        [Kind.DIFFERENTIATE] * 3,
        [Kind.OUTPUTS] * 3,
        [Kind.OPEN] * 2,
        [Kind.OUTPUTS, Kind.DIFFERENTIATE, Kind.OPEN, Kind.DIFFERENTIATE, Kind.OPEN],
    ],
)
def test_a_batch_gives_what_each_request_gets_alone(
    decoder: AnsweringDecoder, kinds: list[Kind]
) -> None:
    alone = InProcessBase(decoder)
    works = [
        _work(kind, place, 2 + place, decoder.width, 4 + 5 * place)
        for place, kind in enumerate(kinds)
    ]
    found, graph = compute(decoder, works)
    upstreams = {}
    for place, work in enumerate(works):
        x = _padded(work)
        counted = np.arange(work.longest) < work.lengths[:, None]
        if work.kind == Kind.DIFFERENTIATE:
            losses, gradient = alone.differentiate(x, work.lengths, work.labels)
            np.testing.assert_allclose(found[place].values, losses, atol=1e-5)
            np.testing.assert_allclose(
                found[place].gradient, gradient[counted], atol=1e-5 * np.abs(gradient).max()
            )
        else:
            scores = alone.outputs(x, work.lengths)
            assert found[place].gradient is None
            np.testing.assert_allclose(found[place].values, scores, atol=1e-5)
        if work.kind == Kind.OPEN:
            random = np.random.default_rng(place)
            upstreams[place] = random.normal(size=scores.shape).astype(np.float32)
    assert (graph is not None) == bool(upstreams)
    # One by one, then all at once: neither may depend on the other.
    for part in ([{place: up} for place, up in upstreams.items()], [upstreams]):
        for step in part if graph is not None else []:
            for place, result in graph.pull_back(step, last=step is upstreams).items():
                work = works[place]
                expected = alone.pull_back(
                    _padded(work), work.lengths, lambda _, place=place: upstreams[place]
                )
                expected = expected[np.arange(work.longest) < work.lengths[:, None]]
                assert result.values is None
                np.testing.assert_allclose(
                    result.gradient, expected, atol=1e-5 * np.abs(expected).max()
                )


def test_values_that_overflow_stay_in_their_own_request(decoder: AnsweringDecoder) -> None:
    honest = _work(Kind.DIFFERENTIATE, 1, 3, decoder.width, 9)
    hostile = _work(Kind.DIFFERENTIATE, 2, 3, decoder.width, 14)
    hostile.tokens[:] = np.where(hostile.tokens > 0, 3e38, -3e38)
    (expected,), _ = compute(decoder, [honest])
    (found, spoiled), _ = compute(decoder, [honest, hostile])
    assert not spoiled.finite
    assert found.finite
    np.testing.assert_allclose(found.values, expected.values, atol=1e-5)
    np.testing.assert_allclose(
        found.gradient, expected.gradient, atol=1e-5 * np.abs(expected.gradient).max()
    )
