"""LoKr: W' = W + scaling * kron(w1, w2); either factor may be a product, the second with a core."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from building import BIASED, CONV1D, CONV2D, EXPERTS, FUSED, IN_OUT, LINEAR, TRANSPOSED, Case, Pair, Update, update
from layers import Array


def formula(
    W: Array,
    b: Array | None,
    w1: Array | None = None,
    w1_a: Array | None = None,
    w1_b: Array | None = None,
    w2: Array | None = None,
    w2_a: Array | None = None,
    w2_b: Array | None = None,
    t2: Array | None = None,
    w2_in: Array | None = None,
    scaling: float = 1.0,
    stacked: bool = False,
) -> Pair:
    """Element by element: output o is a * rows + i, input n is c * inner + j."""
    one = w1 if w1 is not None else np.einsum("ar,rc->ac", w1_a, w1_b)
    kernel = W.shape[2:]
    if stacked:
        assert w2 is not None
        products = [np.kron(one, w2[i].reshape(w2.shape[1], -1)) for i in range(len(w2))]
        return W + scaling * np.stack(products).reshape(W.shape), b
    rows, inner = W.shape[0] // one.shape[0], W.shape[1] // one.shape[1]
    if w2 is not None:
        two = w2.reshape(rows, inner, *kernel)
    elif w2_b is not None:
        two = np.einsum("ir,rc->ic", w2_a, w2_b).reshape(rows, inner, *kernel)
    else:
        two = np.einsum("pq...,ip,qj->ij...", t2, w2_a, w2_in).reshape(rows, inner, *kernel)
    W = W.copy()
    for o in range(W.shape[0]):
        for n in range(W.shape[1]):
            W[o, n] += scaling * one[o // rows, n // inner] * two[o % rows, n % inner]
    return W, b


def cases() -> list[Case]:
    """Every form of both factors, every layer and layout."""
    core = {"w2_a": (3, 2), "t2": (2, 2, 2, 3), "w2_in": (2, 2)}
    return [
        Case("whole", updates=(_made("whole", w1=(2, 3), w2=(2, 2)),), weight=(4, 6), bias=(4,), x=(2, 6)),
        Case("default", updates=(_made("default", None, w1=(3, 5), w2=(1, 1)),), **LINEAR),
        Case("first", updates=(_made("first", w1_a=(2, 1), w1_b=(1, 3), w2=(2, 2)),), weight=(4, 6), x=(2, 6)),
        Case("second", updates=(_made("second", w1=(1, 1), w2_a=(3, 2), w2_b=(2, 5)),), **BIASED),
        Case("both", updates=(_made("both", w1_a=(3, 2), w1_b=(2, 5), w2_a=(1, 2), w2_b=(2, 1)),), **LINEAR),
        Case("conv1d", updates=(_made("conv1d", w1=(3, 2), w2=(1, 1, 3)),), **CONV1D),
        Case("stacked", updates=(_made("stacked", w1=(3, 2), w2=(1, 1, 3), stacked=True),), **CONV1D),
        Case("stacked2d", updates=(_made("stacked2d", w1=(3, 2), w2=(1, 1, 2, 3), stacked=True),), **CONV2D),
        Case("conv2d", updates=(_made("conv2d", w1=(1, 2), w2=(3, 1, 2, 3)),), **CONV2D),
        Case("conv2d_second", updates=(_made("conv2d_second", w1=(3, 1), w2_a=(1, 2), w2_b=(2, 12)),), **CONV2D),
        Case("core", updates=(_made("core", w1=(1, 1), **core),), **CONV2D),
        Case("core1d", updates=(_made("core1d", w1=(3, 1), w2_a=(1, 2), t2=(2, 2, 3, 1), w2_in=(2, 2)),), **CONV1D),
        Case("core_both", updates=(_made("core_both", w1_a=(1, 2), w1_b=(2, 1), **core),), **CONV2D),
        Case("transposed", updates=(_made("transposed", w1=(1, 2), w2=(3, 1, 2, 3)),), **TRANSPOSED),
        Case("in_out", updates=(_made("in_out", w1=(3, 1), w2=(1, 5)),), **IN_OUT),
        Case("experts", updates=(_made("experts", w1=(2, 1, 5), w2=(2, 3, 1)),), **EXPERTS),
        Case("fused", updates=(_made("fused", w1=(3, 1), w2_a=(1, 2), w2_b=(2, 5)),), **FUSED),
        Case("bf16", updates=(_made("bf16", w1=(1, 5), w2=(3, 1)),), dtype="BF16", **LINEAR),
    ]


def _made(seed: str, scaling: float | None = 0.5, stacked: bool = False, **shapes: tuple[int, ...]) -> Update:
    made = update("lokr", f"lokr.{seed}", scaling, **shapes)
    return replace(made, attributes=made.attributes | {"stacked": True}) if stacked else made
