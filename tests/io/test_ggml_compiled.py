"""k-quants by the compiled loops have the bytes of k-quants by numpy."""

from __future__ import annotations

import numpy as np
import pytest
from compiled_loops import needs_loops
from hypothesis import given
from hypothesis import strategies as st

from adapterkit.io import ggml_k_blocks

pytestmark = needs_loops

KINDS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def packed(kind: str, blocks: np.ndarray) -> bytes:
    with np.errstate(all="ignore"):
        return np.concatenate(ggml_k_blocks.k_pieces(kind, blocks), axis=1).tobytes()


@pytest.mark.parametrize("kind", KINDS)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.sampled_from([1e-44, 1e-39, 1e-20, 1e-3, 1.0, 1e9, 1e14, 1e20, 1e36]),
)
def test_the_bytes_are_those_of_numpy(kind: str, seed: int, count: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    blocks = rng.standard_normal((count, 256)).astype(np.float32) * np.float32(scale)
    shapes = (
        np.zeros(32), -np.zeros(32), np.tile([0.0, -0.0], 16), np.ones(32), -np.ones(32),
        np.abs(rng.standard_normal(32)), -np.abs(rng.standard_normal(32)), np.eye(1, 32)[0],
        np.round(rng.standard_normal(32) * 4),
    )  # fmt: skip
    for row in blocks:  # runs that random numbers do not make: none, equal, of one sign, with ties
        for run in rng.integers(0, 8, 3):
            row[32 * run : 32 * run + 32] = shapes[rng.integers(0, len(shapes))] * np.float32(scale)
    asked: list[bool] = []

    def none() -> None:
        asked.append(True)

    ours = packed(kind, blocks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ggml_k_blocks, "loops", none)
        assert packed(kind, blocks) == ours
    assert bool(asked) or scale > 1e13


def test_large_runs_are_compared_whole() -> None:
    blocks = np.random.default_rng(0).standard_normal((4099, 256)).astype(np.float32)
    ours = [packed(kind, blocks) for kind in KINDS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ggml_k_blocks, "loops", lambda: None)
        assert [packed(kind, blocks) for kind in KINDS] == ours
