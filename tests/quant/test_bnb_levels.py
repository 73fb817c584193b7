"""Quantizing to sixteen levels by the compiled loop gives the bytes of numpy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiled_loops import needs_loops
from hypothesis import given
from hypothesis import strategies as st

from adapterkit.io.checkpoint import Checkpoint
from adapterkit.io.lazy import from_numpy
from adapterkit.quant.bnb_4bit import Bnb4bit, packed_levels, quantized

NF4 = np.array(
    [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
     0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0], np.float32,
)  # fmt: skip
FP4 = np.array(
    [0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25, 0.0, -0.0052, -0.6667, -1.0, -0.3333, -0.5, -0.1667, -0.25],
    np.float32,
)

pytestmark = needs_loops


def values_of(seed: int, size: int, blocks: int, rest: int, scale: float, levels: np.ndarray) -> np.ndarray:
    rng, count = np.random.default_rng(seed), blocks * size + rest
    values = (scale * rng.standard_normal(count)).astype(np.float32)
    values[:size] *= rng.integers(0, 2)  # often a block of zeros
    middles = np.sort(levels)[1:] + np.sort(levels)[:-1]
    values[rng.integers(0, count, 5)] = np.float32(scale) * middles[rng.integers(0, 15, 5)] / 2
    return values


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([32, 64, 100, 4096]),
    st.integers(1, 40),
    st.sampled_from([0, 0, 0, 1, 7]),
    st.sampled_from([1e-40, 1e-20, 1.0, 1e30]),
    st.sampled_from([NF4, FP4]),
    st.sampled_from([quantized, packed_levels]),
)
def test_the_bytes_are_those_of_numpy(
    seed: int, size: int, blocks: int, rest: int, scale: float, levels: np.ndarray, how: Callable[..., Any]
) -> None:
    values = values_of(seed, size, blocks, rest, scale, levels)
    asked: list[bool] = []

    def none() -> None:
        asked.append(True)

    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        ours = how(values, levels, size)
        patch.setattr("adapterkit.quant.bnb_4bit.loops", none)
        wanted = how(values, levels, size)
    assert bool(asked) == (rest == 0 and size % 16 == 0)
    assert all(np.array_equal(one, other) and one.dtype == other.dtype for one, other in zip(ours, wanted, strict=True))


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(0, 255), st.sampled_from([1e-40, 1e-20, 1.0, 1e30]),
    st.booleans(),
)  # fmt: skip
def test_scales_become_the_bytes_of_numpy(seed: int, blocks: int, rest: int, scale: float, sorted_: bool) -> None:
    rng = np.random.default_rng(seed)
    table = np.sort(np.append(rng.uniform(-1, 1, 254), [-1, 1])).astype(np.float32)
    values = values_of(seed, 256, blocks, rest, scale, table[::17])
    table = table if sorted_ else rng.permutation(table)
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        ours = quantized(values, table, 256)
        patch.setattr("adapterkit.quant.bnb_4bit.loops", lambda: None)
        wanted = quantized(values, table, 256)
    assert all(np.array_equal(one, other) and one.dtype == other.dtype for one, other in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("levels", [NF4, FP4], ids=["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_the_numbers_are_those_of_numpy(dtype: str, levels: np.ndarray, nested: bool) -> None:
    rng, rows, width, size = np.random.default_rng(0), 96, 128, 64
    scales = (np.exp(rng.standard_normal(rows * width // size) * 4)).astype(np.float32)
    held = {
        "w": rng.integers(0, 256, rows * width // 2).astype(np.uint8), "w.quant_map": levels, "w.absmax": scales,
    }  # fmt: skip
    state = {"quant_type": "nf4", "blocksize": size, "dtype": dtype, "shape": [rows, width]}
    if nested:
        state |= {"nested_blocksize": 16, "nested_offset": 0.25, "nested_dtype": "float32"}
        held |= {"w.absmax": rng.integers(0, 256, len(scales)).astype(np.uint8), "w.nested_absmax": scales[::16].copy(),
                 "w.nested_quant_map": np.linspace(-1, 1, 256).astype(np.float32)}  # fmt: skip
    held["w.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors = {name: from_numpy(array) for name, array in held.items()}
    base = Checkpoint(Path("here"), tensors, (), {}, {}, None, None)
    (weight,) = Bnb4bit().find(base)
    for start, stop in ((0, rows), (3, 50), (95, 96)):
        ours = weight.rows(start, stop)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("adapterkit.quant.bnb_4bit.loops", lambda: None)
            wanted = weight.rows(start, stop)
        assert ours.dtype == wanted.dtype
        assert ours.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_are_left_to_numpy(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    values = np.ones(64, np.float32)
    values[3] = value
    with np.errstate(all="ignore"):
        ours = quantized(values, NF4, 64)
        monkeypatch.setattr("adapterkit.quant.bnb_4bit.loops", lambda: None)
        wanted = quantized(values, NF4, 64)
    assert all(np.array_equal(one, other, equal_nan=True) for one, other in zip(ours, wanted, strict=True))
