"""Dense: W' = W + scaling * D, b' = b + scaling * d."""

from __future__ import annotations

from building import (
    BIASED,
    CONV2D,
    EXPERTS,
    EXPERTS_IN_OUT,
    FUSED,
    IN_OUT,
    LINEAR,
    NORM,
    TRANSPOSED,
    Case,
    Pair,
    update,
)
from layers import Array


def formula(W: Array, b: Array | None, D: Array | None = None, d: Array | None = None, scaling: float = 1.0) -> Pair:
    """W' = W + scaling * D, b' = b + scaling * d."""
    return W if D is None else W + scaling * D, b if d is None else b + scaling * d


def cases() -> list[Case]:
    """Weight, bias, both; every layer and layout."""
    return [
        Case("weight", updates=(update("dense", "dense.weight", scaling=0.25, D=(3, 5)),), **BIASED),
        Case("default_scaling", updates=(update("dense", "dense.default", D=(3, 5)),), **LINEAR),
        Case("weight_and_bias", updates=(update("dense", "dense.wb", scaling=0.25, D=(3, 5), d=(3,)),), **BIASED),
        Case("bias", updates=(update("dense", "dense.bias", scaling=0.25, d=(3,)),), **BIASED),
        Case("conv2d", updates=(update("dense", "dense.conv2d", scaling=0.25, D=(3, 2, 2, 3), d=(3,)),), **CONV2D),
        Case("transposed", updates=(update("dense", "dense.transposed", scaling=0.25, D=(3, 2, 2, 3)),), **TRANSPOSED),
        Case("in_out", updates=(update("dense", "dense.in_out", scaling=0.25, D=(3, 5), d=(3,)),), **IN_OUT),
        Case("norm", updates=(update("dense", "dense.norm", scaling=0.25, D=(3,), d=(3,)),), **NORM),
        Case("experts", updates=(update("dense", "dense.experts", scaling=0.25, D=(2, 3, 5)),), **EXPERTS),
        Case(
            "experts_in_out",
            updates=(update("dense", "dense.e_in_out", scaling=0.25, D=(2, 3, 5), d=(2, 3)),),
            **EXPERTS_IN_OUT,
        ),
        Case("fused", updates=(update("dense", "dense.fused", scaling=0.25, D=(3, 5), d=(3,)),), **FUSED),
        Case("bf16", updates=(update("dense", "dense.bf16", scaling=0.25, D=(3, 5)),), dtype="BF16", **LINEAR),
    ]
