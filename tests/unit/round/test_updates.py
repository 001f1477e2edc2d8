"""Integer updates that arrive in the clear: what one of them may hold."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.errors import MalformedMessage
from fedtune.round.terms import make_ring
from fedtune.round.updates import IntegerUpdates
from fedtune.update.quantize import Quantizer

SIZE = 50


def test_the_one_value_of_the_wire_beyond_the_bound_is_refused_and_not_counted() -> None:
    quantizer = Quantizer(SIZE, 1.0, 12, "clients", 100, metrics=False, noise=None)
    ring = make_ring(quantizer, 1)
    largest = np.zeros(quantizer.slots, np.int64)
    largest[7] = -quantizer.bound
    beyond = largest.copy()
    beyond[7] -= 1
    sent = ring.pack(ring.lower(beyond))
    assert np.array_equal(ring.lift(ring.unpack(sent, quantizer.slots)), beyond)

    total = IntegerUpdates(quantizer).sum(2)
    total.add(0, ring.pack(ring.lower(largest)), 1.0)
    with pytest.raises(MalformedMessage, match=f"beyond the bound of {quantizer.bound}"):
        total.add(1, sent, 1.0)
    total.skip(1)
    found, weight = total.result()
    expected = quantizer.decode(largest, 1)
    assert np.array_equal(found, expected.total)
    assert weight == expected.weight == 1
