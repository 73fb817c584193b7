"""HiRA: W' = W + W * (B @ A), element by element."""

from __future__ import annotations

import numpy as np
from building import (
    BIASED,
    CONV1D,
    CONV2D,
    EMBEDDING,
    EXPERTS,
    FUSED,
    IN_OUT,
    LINEAR,
    TRANSPOSED,
    Case,
    Pair,
    Update,
    low_rank,
)
from layers import Array


def formula(W: Array, b: Array | None, A: Array, B: Array) -> Pair:
    """W' = W * (1 + sum_r B[o, r] A[r, ...])."""
    return W * (1 + np.einsum("or,r...->o...", B, A)), b


def cases() -> list[Case]:
    """Every layer and layout."""
    return [
        Case("linear", updates=(_hira("hira.linear", 3, 5),), **BIASED),
        Case("rank1", updates=(_hira("hira.rank1", 3, 5, r=1),), **LINEAR),
        Case("conv1d", updates=(_hira("hira.conv1d", 3, 2, 3),), **CONV1D),
        Case("conv2d", updates=(_hira("hira.conv2d", 3, 2, 2, 3),), **CONV2D),
        Case("transposed", updates=(_hira("hira.transposed", 3, 2, 2, 3),), **TRANSPOSED),
        Case("in_out", updates=(_hira("hira.in_out", 3, 5),), **IN_OUT),
        Case("embedding", updates=(_hira("hira.embedding", 3, 6),), **EMBEDDING),
        Case("experts", updates=(_hira("hira.experts", 3, 5, e=2),), **EXPERTS),
        Case("fused", updates=(_hira("hira.fused", 3, 5),), **FUSED),
        Case("bf16", updates=(_hira("hira.bf16", 3, 5),), dtype="BF16", **LINEAR),
    ]


def _hira(seed: str, out: int, *ins: int, r: int = 2, e: int | None = None) -> Update:
    return low_rank("hira", seed, out, *ins, r=r, e=e, scaling=None)
