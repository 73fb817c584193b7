"""GLoRA as LyCORIS has it: W' = W + scaling * (W A1 A2 + B1 B2)."""

from __future__ import annotations

import numpy as np
from building import BIASED, CONV1D, CONV2D, EMBEDDING, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update, update
from layers import Array


def formula(W: Array, b: Array | None, A1: Array, A2: Array, B1: Array, B2: Array, scaling: float = 1.0) -> Pair:
    """W' = W + scaling * (W A1 A2 + B1 B2), position by position of the kernel."""
    turned = np.einsum("oj...,jr,ri->oi...", W, A1, A2)
    return W + scaling * (turned + np.einsum("or,ri...->oi...", B1, B2)), b


def cases() -> list[Case]:
    """Every layer and layout."""
    return [
        Case("linear", updates=(_made("linear", 3, 5),), **BIASED),
        Case("default_scaling", updates=(_made("default", 3, 5, scaling=None),), **LINEAR),
        Case("rank1", updates=(_made("rank1", 3, 5, r=1),), **LINEAR),
        Case("conv1d", updates=(_made("conv1d", 3, 2, 3),), **CONV1D),
        Case("conv2d", updates=(_made("conv2d", 3, 2, 2, 3),), **CONV2D),
        Case("in_out", updates=(_made("in_out", 3, 5),), **IN_OUT),
        Case("embedding", updates=(_made("embedding", 3, 6),), **EMBEDDING),
        Case("experts", updates=(_made("experts", 3, 5, e=(2,)),), **EXPERTS),
        Case("fused", updates=(_made("fused", 3, 5),), **FUSED),
        Case("bf16", updates=(_made("bf16", 3, 5),), dtype="BF16", **LINEAR),
    ]


def _made(
    seed: str, out: int, in_: int, *kernel: int, r: int = 2, scaling: float | None = 0.5, e: tuple[int, ...] = ()
) -> Update:
    A1, A2, B1, B2 = (*e, in_, r), (*e, r, in_), (*e, out, r), (*e, r, in_, *kernel)
    return update("glora_products", f"glorap.{seed}", scaling, A1=A1, A2=A2, B1=B1, B2=B2)
