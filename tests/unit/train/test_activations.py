"""Encodings of activations, against numpy's and torch's own types and against their bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedtune.errors import MalformedMessage
from fedtune.train.activations import ENCODINGS, decode, encode, encoded_bytes

FINITE = st.floats(-1e4, 1e4, width=32)
TOKENS = arrays.arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(1, 9)), elements=FINITE)


def passed(tokens: np.ndarray, encoding: str) -> np.ndarray:
    data = encode(tokens, encoding)
    assert len(data) == encoded_bytes(*tokens.shape, encoding)
    return decode(data, *tokens.shape, encoding)


@given(TOKENS)
def test_float32_is_exact_and_the_halves_are_numpys_and_torchs(tokens: np.ndarray) -> None:
    assert np.array_equal(passed(tokens, "float32"), tokens)
    assert np.array_equal(passed(tokens, "float16"), tokens.astype(np.float16).astype(np.float32))
    brain = torch.from_numpy(tokens).to(torch.bfloat16).float().numpy()
    assert np.array_equal(passed(tokens, "bfloat16"), brain)


@given(TOKENS)
def test_int8_errs_by_half_a_step_of_each_token(tokens: np.ndarray) -> None:
    error = np.abs(passed(tokens, "int8") - tokens)
    step = np.abs(tokens).max(1, initial=0.0) / 127
    # Tiny tokens lose digits of the scale itself.
    assert (error <= step[:, None] * (0.5 + 1e-5) + 1e-37).all()


def test_int8_has_a_scale_for_each_token() -> None:
    tokens = np.array([[1e-6, -5e-7], [100.0, 3.0]], np.float32)
    np.testing.assert_allclose(passed(tokens, "int8")[0], tokens[0], rtol=0.01)


def test_a_float16_that_overflows_stays_finite() -> None:
    assert passed(np.full((1, 1), -1e6, np.float32), "float16")[0, 0] == -65504.0


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("change", [b"\0", None])
def test_another_length_is_refused(encoding: str, change: bytes | None) -> None:
    data = encode(np.ones((3, 4), np.float32), encoding)
    wrong = data + change if change else data[:-1]
    with pytest.raises(MalformedMessage, match=f"3 tokens in {len(wrong)} bytes, not {len(data)}"):
        decode(wrong, 3, 4, encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(encoding: str, value: float) -> None:
    data = bytearray(encode(np.ones((1, 2), np.float32), encoding))
    kind = {"float16": "<f2", "bfloat16": "<f4"}.get(encoding, "<f4")
    raw = np.array([value], kind).tobytes()
    raw = raw[2:] if encoding == "bfloat16" else raw
    data[: len(raw)] = raw  # in int8 it is the scale
    with pytest.raises(MalformedMessage, match="not finite"):
        decode(bytes(data), 1, 2, encoding)
