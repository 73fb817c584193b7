"""LoRA: W' = W + scaling * B A, b' = b + scaling * bias."""

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
    FUSED_EXPERTS,
    FUSED_IN_OUT,
    IN_OUT,
    LINEAR,
    TRANSPOSED,
    Case,
    Pair,
    low_rank,
)
from container import numbers
from layers import Array


def formula(W: Array, b: Array | None, A: Array, B: Array, bias: Array | None = None, scaling: float = 1.0) -> Pair:
    """W' = W + scaling * B A, b' = b + scaling * bias."""
    W = W + scaling * np.einsum("or,ri->oi", B, A.reshape(len(A), -1)).reshape(W.shape)
    return W, b if bias is None else b + scaling * bias


def cases() -> list[Case]:
    """Scalings, ranks, the bias, every layer and layout, shared factors, element types."""
    shared = numbers("lora.shared", 2, 5)
    return [
        Case("linear", updates=(low_rank("lora", "lora.linear", 3, 5),), **BIASED),
        Case("default_scaling", updates=(low_rank("lora", "lora.default", 3, 5, scaling=None),), **LINEAR),
        Case("negative_scaling", updates=(low_rank("lora", "lora.neg", 3, 5, scaling=-1.5),), **LINEAR),
        Case("rank1", updates=(low_rank("lora", "lora.rank1", 3, 5, r=1),), **LINEAR),
        Case("wide", updates=(low_rank("lora", "lora.wide", 3, 5, r=7),), **LINEAR),
        Case("bias", updates=(low_rank("lora", "lora.bias", 3, 5, bias=numbers("lora.bias.b", 3)),), **BIASED),
        Case("conv1d", updates=(low_rank("lora", "lora.conv1d", 3, 2, 3),), **CONV1D),
        Case("conv2d", updates=(low_rank("lora", "lora.conv2d", 3, 2, 2, 3),), **CONV2D),
        Case("transposed", updates=(low_rank("lora", "lora.transposed", 3, 2, 2, 3),), **TRANSPOSED),
        Case("in_out", updates=(low_rank("lora", "lora.in_out", 3, 5),), **IN_OUT),
        Case("embedding", updates=(low_rank("lora", "lora.embedding", 3, 6),), **EMBEDDING),
        Case("experts", updates=(low_rank("lora", "lora.experts", 3, 5, e=2),), **EXPERTS),
        Case(
            "experts_in_out",
            updates=(low_rank("lora", "lora.experts_in_out", 3, 5, e=2, bias=numbers("lora.e.b", 2, 3)),),
            **EXPERTS_IN_OUT,
        ),
        Case("fused", updates=(low_rank("lora", "lora.fused", 3, 5, bias=numbers("lora.fused.b", 3)),), **FUSED),
        Case("fused_in_out", updates=(low_rank("lora", "lora.fused_in_out", 3, 5),), **FUSED_IN_OUT),
        Case("fused_experts", updates=(low_rank("lora", "lora.fused_experts", 3, 5, e=2),), **FUSED_EXPERTS),
        Case(
            "two", updates=(low_rank("lora", "lora.two.a", 3, 5), low_rank("lora", "lora.two.b", 3, 5, r=1)), **LINEAR
        ),
        Case("shared_one", updates=(low_rank("lora", "lora.shared.1", 3, 5, A=shared),), **LINEAR),
        Case("shared_two", updates=(low_rank("lora", "lora.shared.2", 3, 5, A=shared),), **LINEAR),
        Case("f32", updates=(low_rank("lora", "lora.f32", 3, 5),), dtype="F32", **LINEAR),
        Case("f16", updates=(low_rank("lora", "lora.f16", 3, 5),), dtype="F16", **LINEAR),
        Case("bf16", updates=(low_rank("lora", "lora.bf16", 3, 5),), dtype="BF16", **LINEAR),
    ]
