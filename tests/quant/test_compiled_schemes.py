"""Integers in groups and 4-bit floats by the compiled loops: the bytes of numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiled_loops import needs_loops
from hypothesis import given
from hypothesis import strategies as st

from adapterkit import quant
from adapterkit.io.checkpoint import Checkpoint
from adapterkit.io.lazy import from_numpy
from adapterkit.quant import Packed, _grouped, nearest_e2m1
from adapterkit.quant.gptq import Gptq

pytestmark = needs_loops


def gptq(rng: np.random.Generator, out: int, groups: int, size: int, order: str) -> Packed:
    """A weight of 4 bits; `order` is that of its columns: in runs, mixed, or in groups of unlike sizes."""
    ins = groups * size
    index = np.repeat(np.arange(groups), size).astype(np.int32)
    if order == "mixed":
        index = rng.permutation(index).astype(np.int32)
    if order == "unlike":
        index[size - 1] = groups - 1
    held = {
        "m.qweight": rng.integers(-(2**31), 2**31, (ins // 8, out)).astype(np.int32),
        "m.qzeros": rng.integers(-(2**31), 2**31, (groups, out // 8)).astype(np.int32),
        "m.scales": rng.uniform(0.001, 0.1, (groups, out)).astype(np.float16), "m.g_idx": index,
    }  # fmt: skip
    config: dict[str, Any] = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": size}}
    tensors = {name: from_numpy(array) for name, array in held.items()}
    (weight,) = Gptq().find(Checkpoint(Path("here"), tensors, (), {}, {}, config, None))
    return weight


@pytest.mark.parametrize("order", ["runs", "mixed", "unlike"])
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from([8, 32, 128]), st.sampled_from([1e-9, 1.0, 1e30]))
def test_groups_are_quantized_as_by_numpy(order: str, seed: int, groups: int, size: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    weight = gptq(rng, 32, groups, size, order if groups > 1 else "runs")
    values = (scale * rng.standard_normal(weight.shape)).astype(np.float32)
    values[rng.integers(0, 32)] = 0
    values[rng.integers(0, 32), :size] = np.abs(values[0, :size])
    with np.errstate(all="ignore"), pytest.MonkeyPatch.context() as patch:
        ours = weight.pack(lambda start, stop: values[start:stop])
        patch.setattr(_grouped, "loops", lambda: None)
        wanted = weight.pack(lambda start, stop: values[start:stop])
    assert ours.keys() == wanted.keys()
    assert all(ours[name].tobytes() == wanted[name].tobytes() for name in wanted)


@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.sampled_from([0.01, 1.0, 100.0]))
def test_four_bit_floats_are_those_of_numpy(seed: int, count: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    values = (scale * rng.standard_normal(count)).astype(np.float32)
    ties = np.array([0, -0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, np.inf, -np.inf, np.nan], np.float32)
    values[rng.integers(0, count, 7)] = rng.choice(ties, 7) * rng.choice(np.float32([1, -1]), 7)
    ours = nearest_e2m1(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quant, "loops", lambda: None)
        wanted = nearest_e2m1(values)
    assert np.array_equal(ours, wanted)
