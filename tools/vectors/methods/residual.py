"""Residual: W' = W - scaling * B A, or W - scaling * D."""

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
    IN_OUT,
    LINEAR,
    TRANSPOSED,
    Case,
    Pair,
    low_rank,
    update,
)
from layers import Array


def formula(
    W: Array, b: Array | None, A: Array | None = None, B: Array | None = None, D: Array | None = None,
    scaling: float = 1.0,
) -> Pair:  # fmt: skip
    """W' = W - scaling * B A, or W - scaling * D."""
    if A is None or B is None:
        return W - scaling * D, b
    return W - scaling * np.einsum("or,ri->oi", B, A.reshape(len(A), -1)).reshape(W.shape), b


def cases() -> list[Case]:
    """Factors and the whole part, scalings, every layer and layout, beside the LoRA that it is made for."""
    began = low_rank("residual", "residual.beside", 3, 5)
    return [
        Case("linear", updates=(low_rank("residual", "residual.linear", 3, 5),), **BIASED),
        Case("default_scaling", updates=(low_rank("residual", "residual.default", 3, 5, scaling=None),), **LINEAR),
        Case("conv1d", updates=(low_rank("residual", "residual.conv1d", 3, 2, 3),), **CONV1D),
        Case("conv2d", updates=(low_rank("residual", "residual.conv2d", 3, 2, 2, 3),), **CONV2D),
        Case("transposed", updates=(low_rank("residual", "residual.transposed", 3, 2, 2, 3),), **TRANSPOSED),
        Case("in_out", updates=(low_rank("residual", "residual.in_out", 3, 5),), **IN_OUT),
        Case("embedding", updates=(low_rank("residual", "residual.embedding", 3, 6),), **EMBEDDING),
        Case("experts", updates=(low_rank("residual", "residual.experts", 3, 5, e=2),), **EXPERTS),
        Case("experts_in_out", updates=(low_rank("residual", "residual.e_in", 3, 5, e=2),), **EXPERTS_IN_OUT),
        Case("fused", updates=(low_rank("residual", "residual.fused", 3, 5),), **FUSED),
        Case("beside_a_lora", updates=(began, low_rank("lora", "residual.lora", 3, 5)), **LINEAR),
        Case("whole", updates=(update("residual", "residual.whole", D=(3, 5)),), **BIASED),
        Case("whole_scaled", updates=(update("residual", "residual.scaled", scaling=0.25, D=(3, 2, 2, 3)),), **CONV2D),
        Case("bf16", updates=(low_rank("residual", "residual.bf16", 3, 5),), dtype="BF16", **LINEAR),
    ]
