"""DoRA: W'[o] = magnitude[o] * V[o] / |V[o]|, with V = W + scaling * B A."""

from __future__ import annotations

from typing import Any

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
    Case,
    Pair,
    Update,
    low_rank,
)
from container import numbers
from layers import Array

from methods import lora


def formula(W: Array, b: Array | None, A: Array, B: Array, magnitude: Array, scaling: float = 1.0) -> Pair:
    """W'[o] = magnitude[o] * V[o] / |V[o]|."""
    V, _ = lora.formula(W, None, A, B, scaling=scaling)
    return np.stack([m * v / np.sqrt((v * v).sum()) for m, v in zip(magnitude, V, strict=True)]), b


def cases() -> list[Case]:
    """Every layer and layout, and the order of a DoRA and a LoRA on one target."""
    return [
        Case("linear", updates=(_dora("dora.linear", 3, 5),), **BIASED),
        Case("default_scaling", updates=(_dora("dora.default", 3, 5, scaling=None),), **LINEAR),
        Case("rank1", updates=(_dora("dora.rank1", 3, 5, r=1),), **LINEAR),
        Case("conv1d", updates=(_dora("dora.conv1d", 3, 2, 3),), **CONV1D),
        Case("conv2d", updates=(_dora("dora.conv2d", 3, 2, 2, 3),), **CONV2D),
        Case("in_out", updates=(_dora("dora.in_out", 3, 5),), **IN_OUT),
        Case("embedding", updates=(_dora("dora.embedding", 3, 6),), **EMBEDDING),
        Case("experts", updates=(_dora("dora.experts", 3, 5, e=2),), **EXPERTS),
        Case("experts_in_out", updates=(_dora("dora.experts_in_out", 3, 5, e=2),), **EXPERTS_IN_OUT),
        Case("fused", updates=(_dora("dora.fused", 3, 5),), **FUSED),
        Case("before_lora", updates=(_dora("dora.before", 3, 5), low_rank("lora", "dora.before.l", 3, 5)), **LINEAR),
        Case("after_lora", updates=(low_rank("lora", "dora.after.l", 3, 5), _dora("dora.after", 3, 5)), **LINEAR),
        Case("bf16", updates=(_dora("dora.bf16", 3, 5),), dtype="BF16", **LINEAR),
    ]


def _dora(seed: str, out: int, *ins: int, e: int | None = None, **options: Any) -> Update:
    shape = (out,) if e is None else (e, out)
    return low_rank("dora", seed, out, *ins, e=e, magnitude=numbers(f"{seed}.m", *shape, positive=True), **options)
