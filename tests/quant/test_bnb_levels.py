"""Quantizing to sixteen levels by the compiled loop gives the bytes of numpy."""

from __future__ import annotations

import numpy as np
import pytest
from compiled_loops import needs_loops
from hypothesis import given
from hypothesis import strategies as st

from adapterkit.quant.bnb_4bit import quantized

NF4 = np.array(
    [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
     0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0], np.float32,
)  # fmt: skip
FP4 = np.array(
    [0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25, 0.0, -0.0052, -0.6667, -1.0, -0.3333, -0.5, -0.1667, -0.25],
    np.float32,
)

pytestmark = needs_loops


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([32, 64, 100, 4096]),
    st.integers(1, 3000),
    st.sampled_from([1e-40, 1e-20, 1.0, 1e30]),
    st.sampled_from([NF4, FP4]),
)
def test_the_bytes_are_those_of_numpy(seed: int, size: int, count: int, scale: float, levels: np.ndarray) -> None:
    rng = np.random.default_rng(seed)
    values = (scale * rng.standard_normal(count)).astype(np.float32)
    values[: min(count, size)] *= rng.integers(0, 2)  # often a block of zeros
    middles = np.sort(levels)[1:] + np.sort(levels)[:-1]
    values[rng.integers(0, count, 5)] = np.float32(scale) * middles[rng.integers(0, 15, 5)] / 2
    asked: list[bool] = []

    def none() -> None:
        asked.append(True)

    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        ours = quantized(values, levels, size)
        patch.setattr("adapterkit.quant.bnb_4bit.loops", none)
        wanted = quantized(values, levels, size)
    assert asked
    assert all(np.array_equal(one, other) and one.dtype == other.dtype for one, other in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_are_left_to_numpy(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    values = np.ones(64, np.float32)
    values[3] = value
    with np.errstate(all="ignore"):
        ours = quantized(values, NF4, 64)
        monkeypatch.setattr("adapterkit.quant.bnb_4bit.loops", lambda: None)
        wanted = quantized(values, NF4, 64)
    assert all(np.array_equal(one, other, equal_nan=True) for one, other in zip(ours, wanted, strict=True))
