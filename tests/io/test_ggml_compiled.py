"""ggml's block types by the compiled loops: the bytes and numbers of those by numpy."""

from __future__ import annotations

import numpy as np
import pytest
from compiled_loops import needs_loops
from hypothesis import given
from hypothesis import strategies as st

from adapterkit.io import ggml_blocks
from adapterkit.io.ggml_blocks import BLOCKS, decoded, encoded, encoded_by_numpy
from adapterkit.native import loops

pytestmark = needs_loops

SCALES = (1e-44, 1e-39, 1e-20, 1e-3, 1.0, 1e9, 1e14, 1e20, 1e36)


def blocks_of(kind: str, seed: int, count: int, scale: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    blocks = rng.standard_normal((count, 256)).astype(np.float32) * np.float32(scale)
    shapes = (
        np.zeros(32), -np.zeros(32), np.tile([0.0, -0.0], 16), np.ones(32), -np.ones(32), np.tile([1.0, -1.0], 16),
        np.abs(rng.standard_normal(32)), -np.abs(rng.standard_normal(32)), np.eye(1, 32)[0],
        np.abs(np.round(rng.standard_normal(32))), np.round(rng.standard_normal(32) * 4),
    )  # fmt: skip
    for row in blocks:  # runs that random numbers do not make: none, equal, of one sign, with ties
        for run in rng.integers(0, 8, 3):
            row[32 * run : 32 * run + 32] = shapes[rng.integers(0, len(shapes))] * np.float32(scale)
    return blocks.reshape(-1, BLOCKS[kind][1])


@pytest.mark.parametrize("kind", BLOCKS)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from(SCALES))
def test_the_bytes_are_those_of_numpy(kind: str, seed: int, count: int, scale: float) -> None:
    blocks = blocks_of(kind, seed, count, scale)
    assert encoded(kind, blocks) == encoded_by_numpy(kind, blocks)


@pytest.mark.parametrize("kind", BLOCKS)
def test_large_runs_are_compared_whole(kind: str) -> None:
    blocks = np.random.default_rng(0).standard_normal((4099, BLOCKS[kind][1])).astype(np.float32)
    made = np.empty((len(blocks), BLOCKS[kind][2]), np.uint8)
    left = loops().adapterkit_ggml_encode(
        BLOCKS[kind][0], blocks.ctypes.data, len(blocks), made.ctypes.data, BLOCKS[kind][2]
    )
    assert left == 0, "ordinary numbers are not left to numpy"
    assert made.tobytes() == encoded_by_numpy(kind, blocks)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e16])
def test_numbers_whose_order_counts_are_left_to_numpy(kind: str, bad: float) -> None:
    blocks = np.ones((3, BLOCKS[kind][1]), np.float32)
    blocks[1, 5] = bad
    made = np.empty((3, BLOCKS[kind][2]), np.uint8)
    assert loops().adapterkit_ggml_encode(BLOCKS[kind][0], blocks.ctypes.data, 3, made.ctypes.data, BLOCKS[kind][2])


@pytest.mark.parametrize("kind", BLOCKS)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_the_numbers_are_those_of_numpy(kind: str, seed: int, count: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, (count, BLOCKS[kind][2]), np.uint8)
    ours = decoded(kind, data.tobytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ggml_blocks, "loops", lambda: None)
        theirs = decoded(kind, data.tobytes())
    # Random bytes hold scales that are NaN, too. Which NaN comes of it is not part of the format.
    assert np.array_equal(ours.view("u4")[~np.isnan(theirs)], theirs.view("u4")[~np.isnan(theirs)])
    assert np.array_equal(np.isnan(ours), np.isnan(theirs))
