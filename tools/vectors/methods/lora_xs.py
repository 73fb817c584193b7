"""LoRA-XS: W' = W + scaling * B @ R @ A."""

from __future__ import annotations

import numpy as np
from building import (
    BIASED,
    CONV1D,
    CONV2D,
    EMBEDDING,
    EXPERTS,
    EXPERTS_IN_OUT,
    FUSED,
    FUSED_IN_OUT,
    IN_OUT,
    LINEAR,
    TRANSPOSED,
    Case,
    Pair,
    Update,
    update,
)
from layers import Array


def formula(W: Array, b: Array | None, A: Array, R: Array, B: Array, scaling: float = 1.0) -> Pair:
    """W' = W + scaling * sum_pq B[o, p] R[p, q] A[q, i, *k]."""
    return W + scaling * np.einsum("op,pq,qi...->oi...", B, R, A), b


def cases() -> list[Case]:
    """Every layer and layout."""
    return [
        Case("linear", updates=(_made("linear", 3, 5),), **BIASED),
        Case("default_scaling", updates=(_made("default", 3, 5, scaling=None),), **LINEAR),
        Case("rank1", updates=(_made("rank1", 3, 5, r=1),), **LINEAR),
        Case("conv1d", updates=(_made("conv1d", 3, 2, 3),), **CONV1D),
        Case("conv2d", updates=(_made("conv2d", 3, 2, 2, 3),), **CONV2D),
        Case("transposed", updates=(_made("transposed", 3, 2, 2, 3),), **TRANSPOSED),
        Case("in_out", updates=(_made("in_out", 3, 5),), **IN_OUT),
        Case("embedding", updates=(_made("embedding", 3, 6),), **EMBEDDING),
        Case("experts", updates=(_made("experts", 3, 5, e=(2,)),), **EXPERTS),
        Case("experts_in_out", updates=(_made("experts_in_out", 3, 5, e=(2,)),), **EXPERTS_IN_OUT),
        Case("fused", updates=(_made("fused", 3, 5),), **FUSED),
        Case("fused_in_out", updates=(_made("fused_in_out", 3, 5),), **FUSED_IN_OUT),
        Case("bf16", updates=(_made("bf16", 3, 5),), dtype="BF16", **LINEAR),
    ]


def _made(seed: str, out: int, *ins: int, r: int = 2, scaling: float | None = 0.5, e: tuple[int, ...] = ()) -> Update:
    return update("lora_xs", f"lora_xs.{seed}", scaling, A=(*e, r, *ins), R=(*e, r, r), B=(*e, out, r))
