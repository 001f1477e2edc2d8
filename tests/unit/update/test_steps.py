"""Update steps: bounds from IEEE 754, order and lengths."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config import Update
from fedtune.errors import MalformedMessage, TrainingError
from fedtune.update import HalfPrecision, UpdatePipeline, make_pipeline

# float16 is normal from 2⁻¹⁴ on; below, the spacing is 2⁻²⁴ and the error at most half of it.
NORMAL = st.floats(2**-14, 65504, width=32)
SUBNORMAL = st.floats(0, 2**-14, width=32)


def _half(vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    pipeline = UpdatePipeline(len(vector), [HalfPrecision()])
    return pipeline.decode(pipeline.encode(vector))


@given(st.lists(st.tuples(NORMAL, st.sampled_from([-1, 1])), min_size=1))
def test_float16_is_within_its_relative_error(signed):
    vector = np.array([value * sign for value, sign in signed], np.float32)
    back = _half(vector).astype(np.float64)
    assert (np.abs(back - vector) <= np.abs(vector) * 2.0**-11).all()


@given(st.lists(SUBNORMAL, min_size=1))
def test_float16_is_within_its_absolute_error_near_zero(values):
    vector = np.array(values, np.float32)
    assert (np.abs(_half(vector).astype(np.float64) - vector) <= 2.0**-25).all()


def test_float16_is_ieee_little_endian_and_keeps_what_it_can_represent():
    vector = np.array([1.0, -2.0, 65504.0, 2.0**-24, 0.333251953125], np.float32)
    pipeline = UpdatePipeline(5, [HalfPrecision()])
    data = pipeline.encode(vector)
    assert data == struct.pack("<5e", *vector)  # CPython's own conversion
    decoded = pipeline.decode(data)
    assert decoded.dtype == np.float32
    assert decoded.tolist() == vector.tolist()


@pytest.mark.parametrize("value", [65505.0, -65520.0, 1e30, np.inf, -np.inf])
def test_float16_refuses_what_it_cannot_hold(value):
    with pytest.raises(TrainingError, match="float16"):
        HalfPrecision().forward(np.array([0, value], np.float32))


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32)))
def test_no_steps_keep_every_bit(values):
    vector = np.array(values, np.float32)
    pipeline = UpdatePipeline(len(vector))
    data = pipeline.encode(vector)
    assert data == struct.pack(f"<{len(vector)}f", *vector)
    assert pipeline.decode(data).tobytes() == data


@pytest.mark.parametrize(("compress", "bytes_each"), [("none", 4), ("float16", 2)])
def test_encoded_bytes_is_the_length_of_what_is_encoded(compress, bytes_each):
    pipeline = make_pipeline(Update(compress=compress), 37)
    assert pipeline.encoded_bytes == 37 * bytes_each
    assert len(pipeline.encode(np.zeros(37, np.float32))) == 37 * bytes_each


@pytest.mark.parametrize("compress", ["none", "float16"])
def test_decode_refuses_another_number_of_values(compress):
    pipeline = make_pipeline(Update(compress=compress), 4)
    data = pipeline.encode(np.ones(4, np.float32))
    width = len(data) // 4
    for wrong in (b"", data[:-width], data + data[:width]):
        with pytest.raises(MalformedMessage):
            pipeline.decode(wrong)


@pytest.mark.parametrize(("compress", "code"), [("none", "<f4"), ("float16", "<f2")])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_decode_refuses_what_is_not_finite(compress, code, value):
    pipeline = make_pipeline(Update(compress=compress), 3)
    with pytest.raises(MalformedMessage, match="1 of 3"):
        pipeline.decode(np.array([1, value, 2], code).tobytes())


class _Double:
    dtype = np.dtype("<f4")

    def forward(self, update: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return update * 2

    def backward(self, update: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return update / 2


class _AddOneInFloat64:
    dtype = np.dtype("<f8")

    def forward(self, update: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return update.astype(np.float64) + 1

    def backward(self, update: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return update - 1


def test_steps_run_in_order_and_backwards_in_reverse():
    vector = np.array([3.0, -5.0], np.float32)
    double_first = UpdatePipeline(2, [_Double(), _AddOneInFloat64()])
    assert np.frombuffer(double_first.encode(vector), "<f8").tolist() == [7.0, -9.0]
    assert double_first.encoded_bytes == 16
    back = double_first.decode(double_first.encode(vector))
    assert back.tolist() == [3.0, -5.0]
    assert back.dtype == np.float32
    add_first = UpdatePipeline(2, [_AddOneInFloat64(), _Double()])
    assert np.frombuffer(add_first.encode(vector), "<f4").tolist() == [8.0, -8.0]
    assert add_first.decode(add_first.encode(vector)).tolist() == [3.0, -5.0]
