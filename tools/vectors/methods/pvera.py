"""PVeRA: VeRA with the first halves of d and of A's rows; the others belong to the variance."""

from __future__ import annotations

import numpy as np
from building import BIASED, EMBEDDING, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update, update
from container import numbers
from layers import Array


def formula(W: Array, bias: Array | None, b: Array, B: Array, d: Array, A: Array) -> Pair:
    """W' = W + sum_r b[o] B[o, r] d[r] A[r, i], r < half of d's length."""
    out, in_ = W.shape
    half = len(d) // 2
    return W + np.einsum("o,or,r,ri->oi", b, B[:out], d[:half], A[:half, :in_]), bias


def cases() -> list[Case]:
    """Weights of several sizes that share projections, and every layout."""
    A, B = numbers("pvera.A", 4, 7), numbers("pvera.B", 6, 2)
    fit = numbers("pvera.fit.A", 4, 5), numbers("pvera.fit.B", 3, 2)
    stack = numbers("pvera.stack.A", 2, 4, 5), numbers("pvera.stack.B", 2, 4, 2)
    return [
        Case("linear", updates=(_made("linear", 3, A, B),), **BIASED),
        Case("wide", updates=(_made("wide", 2, A, B),), weight=(2, 7), x=(2, 7)),
        Case("fit", updates=(_made("fit", 3, *fit),), **LINEAR),
        Case("in_out", updates=(_made("in_out", 3, A, B),), **IN_OUT),
        Case("embedding", updates=(_made("embedding", 3, A, B),), **EMBEDDING),
        Case("experts", updates=(_made("experts", 3, *stack, e=(2,)),), **EXPERTS),
        Case("fused", updates=(_made("fused", 3, A, B),), **FUSED),
        Case("bf16", updates=(_made("bf16", 3, *fit),), dtype="BF16", **LINEAR),
    ]


def _made(seed: str, out: int, A: Array, B: Array, e: tuple[int, ...] = ()) -> Update:
    own = update("pvera", f"pvera.{seed}", b=(*e, out), d=(*e, 2 * B.shape[-1]))
    return Update("pvera", own.tensors | {"A": A, "B": B})
