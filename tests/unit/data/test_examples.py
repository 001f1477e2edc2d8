"""The value types."""

import numpy as np
import pytest

from fedtune.data import TextExamples, label_counts


def test_select_keeps_the_order_of_the_indices():
    examples = TextExamples(("x", "y", "z"), np.array([0, 2, 1]))
    chosen = examples.select([2, 0, 2])
    assert chosen.texts == ("z", "x", "z")
    assert chosen.labels.tolist() == [1, 0, 1]
    assert len(chosen) == 3
    assert len(examples.select([])) == 0


def test_texts_and_labels_must_go_together():
    for labels in (np.array([0]), np.array([[0, 1]]), np.array([0, 1], np.int32)):
        with pytest.raises(ValueError, match="2 texts"):
            TextExamples(("x", "y"), labels)


def test_label_counts():
    examples = TextExamples(("x", "y", "z"), np.array([0, 2, 0]))
    counts = label_counts(examples, 4)
    assert counts.tolist() == [2, 0, 1, 0]
    assert counts.dtype == np.int64
    with pytest.raises(ValueError, match="label 2 is not one of 2"):
        label_counts(examples, 2)
