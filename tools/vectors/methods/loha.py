"""LoHa: W' = W + scaling * P1 * P2, products of two factors each, or of two factors and a core."""

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
    update,
)
from layers import Array


def formula(
    W: Array,
    b: Array | None,
    w1_a: Array,
    w2_a: Array,
    w1_b: Array | None = None,
    w2_b: Array | None = None,
    t1: Array | None = None,
    w1_in: Array | None = None,
    t2: Array | None = None,
    w2_in: Array | None = None,
    scaling: float = 1.0,
) -> Pair:
    """W' = W + scaling * P1 * P2."""
    one, two = _product(W, w1_a, w1_b, t1, w1_in), _product(W, w2_a, w2_b, t2, w2_in)
    return W + scaling * one * two, b


def _product(W: Array, a: Array, b: Array | None, core: Array | None, inputs: Array | None) -> Array:
    if b is not None:
        return np.einsum("or,rc->oc", a, b).reshape(W.shape)
    assert core is not None
    assert inputs is not None
    return np.einsum("pq...,op,qi->oi...", core, a, inputs).reshape(W.shape)


def cases() -> list[Case]:
    """Both forms at every layer and layout."""
    return [
        Case("linear", updates=(_plain("loha.linear", 3, 5),), **BIASED),
        Case("default_scaling", updates=(_plain("loha.default", 3, 5, scaling=None),), **LINEAR),
        Case("rank1", updates=(_plain("loha.rank1", 3, 5, r=1),), **LINEAR),
        Case("conv1d", updates=(_plain("loha.conv1d", 3, 6),), **CONV1D),
        Case("conv2d", updates=(_plain("loha.conv2d", 3, 12),), **CONV2D),
        Case("core1d", updates=(_cored("loha.core1d", 3, 2, 3, 1),), **CONV1D),
        Case("core2d", updates=(_cored("loha.core2d", 3, 2, 2, 3),), **CONV2D),
        Case("transposed", updates=(_cored("loha.transposed", 3, 2, 2, 3),), **TRANSPOSED),
        Case("in_out", updates=(_plain("loha.in_out", 3, 5),), **IN_OUT),
        Case("embedding", updates=(_plain("loha.embedding", 3, 6),), **EMBEDDING),
        Case("experts", updates=(_plain("loha.experts", 3, 5, e=(2,)),), **EXPERTS),
        Case("fused", updates=(_plain("loha.fused", 3, 5),), **FUSED),
        Case("bf16", updates=(_plain("loha.bf16", 3, 5),), dtype="BF16", **LINEAR),
    ]


def _plain(
    seed: str, out: int, columns: int, r: int = 2, scaling: float | None = 0.5, e: tuple[int, ...] = ()
) -> Update:
    a, b = (*e, out, r), (*e, r, columns)
    return update("loha", seed, scaling, w1_a=a, w1_b=b, w2_a=a, w2_b=b)


def _cored(seed: str, out: int, in_: int, *kernel: int, r: int = 2) -> Update:
    core = (r, r, *kernel)
    return update("loha", seed, 0.5, w1_a=(out, r), w2_a=(out, r), t1=core, w1_in=(r, in_), t2=core, w2_in=(r, in_))
