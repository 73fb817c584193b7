"""DeLoRA: W' = W + strength / r times a sum of pairs of unit length, columns weighed by w_norm."""

from __future__ import annotations

import numpy as np
from building import BIASED, EMBEDDING, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update, update
from layers import Array


def formula(W: Array, b: Array | None, A: Array, B: Array, strength: Array, w_norm: Array) -> Pair:
    """Pair by pair."""
    W = W.copy()
    for i in range(len(A)):
        lengths = max(np.linalg.norm(A[i]), 1e-4) * max(np.linalg.norm(B[:, i]), 1e-4)
        W = W + strength[0] / len(A) / lengths * np.outer(B[:, i], A[i] * w_norm)
    return W, b


def cases() -> list[Case]:
    """Ranks, a pair that is zero, every layout."""
    return [
        Case("linear", updates=(_some("linear", 3, 5),), **BIASED),
        Case("rank1", updates=(_some("rank1", 3, 5, r=1),), **LINEAR),
        Case("zero", updates=(_zero(),), **LINEAR),
        Case("in_out", updates=(_some("in_out", 3, 5),), **IN_OUT),
        Case("embedding", updates=(_some("embedding", 3, 6),), **EMBEDDING),
        Case("experts", updates=(_some("experts", 3, 5, e=2),), **EXPERTS),
        Case("fused", updates=(_some("fused", 3, 5),), **FUSED),
        Case("bf16", updates=(_some("bf16", 3, 5),), dtype="BF16", **LINEAR),
    ]


def _some(seed: str, out: int, in_: int, r: int = 2, e: int = 0) -> Update:
    lead = (e,) if e else ()
    shapes = {"A": (*lead, r, in_), "B": (*lead, out, r), "strength": (*lead, 1), "w_norm": (*lead, in_)}
    return update("delora", f"delora.{seed}", **shapes)


def _zero() -> Update:
    made = _some("zero", 3, 5)
    B = made.tensors["B"].copy()
    B[:, 1] = 0
    return Update("delora", made.tensors | {"B": B})
