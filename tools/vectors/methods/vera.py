"""VeRA: W' = W + diag(b) B[:out] diag(d) A[:, :in]; A and B are shared."""

from __future__ import annotations

import numpy as np
from building import BIASED, EMBEDDING, EXPERTS, FUSED, FUSED_IN_OUT, IN_OUT, LINEAR, Case, Pair, Update, update
from container import numbers
from layers import Array


def formula(W: Array, bias: Array | None, b: Array, B: Array, d: Array, A: Array) -> Pair:
    """W' = W + sum_r b[o] B[o, r] d[r] A[r, i], o and i no further than W goes."""
    out, in_ = W.shape
    return W + np.einsum("o,or,r,ri->oi", b, B[:out], d, A[:, :in_]), bias


def cases() -> list[Case]:
    """Weights of several sizes that share projections, and every layout."""
    A, B = numbers("vera.A", 2, 7), numbers("vera.B", 6, 2)
    fit = numbers("vera.fit.A", 2, 5), numbers("vera.fit.B", 3, 2)
    stack = numbers("vera.stack.A", 2, 2, 5), numbers("vera.stack.B", 2, 4, 2)
    return [
        Case("linear", updates=(_made("linear", 3, A, B),), **BIASED),
        Case("wide", updates=(_made("wide", 2, A, B),), weight=(2, 7), x=(2, 7)),
        Case("tall", updates=(_made("tall", 6, A, B),), weight=(6, 4), x=(2, 4)),
        Case("fit", updates=(_made("fit", 3, *fit),), **LINEAR),
        Case("in_out", updates=(_made("in_out", 3, A, B),), **IN_OUT),
        Case("embedding", updates=(_made("embedding", 3, A, B),), **EMBEDDING),
        Case("experts", updates=(_made("experts", 3, *stack, e=(2,)),), **EXPERTS),
        Case("fused", updates=(_made("fused", 3, A, B),), **FUSED),
        Case("fused_in_out", updates=(_made("fused_in_out", 3, A, B),), **FUSED_IN_OUT),
        Case("bf16", updates=(_made("bf16", 3, *fit),), dtype="BF16", **LINEAR),
    ]


def _made(seed: str, out: int, A: Array, B: Array, e: tuple[int, ...] = ()) -> Update:
    own = update("vera", f"vera.{seed}", b=(*e, out), d=(*e, B.shape[-1]))
    return Update("vera", own.tensors | {"A": A, "B": B})
