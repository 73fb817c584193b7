"""TinyLoRA: W' = W + B (sum of v[i] P[i]) A."""

from __future__ import annotations

import numpy as np
from building import BIASED, EMBEDDING, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update, update
from container import numbers
from layers import Array


def formula(W: Array, b: Array | None, A: Array, B: Array, P: Array, v: Array) -> Pair:
    """W' = W + the sum of v[i] B P[i] A."""
    return W + sum(v[i] * np.einsum("or,rs,si->oi", B, P[i], A) for i in range(len(v))), b


def cases() -> list[Case]:
    """One number, one that two targets share, every layout."""
    v = numbers("tinylora.v", 3)
    return [
        Case("linear", updates=(_some("linear", 3, 5),), **BIASED),
        Case("rank1", updates=(_some("rank1", 3, 5, r=1, u=1),), **LINEAR),
        Case("shared_one", updates=(_some("shared_one", 3, 5, v=v),), **LINEAR),
        Case("shared_two", updates=(_some("shared_two", 3, 5, v=v),), **LINEAR),
        Case("in_out", updates=(_some("in_out", 3, 5),), **IN_OUT),
        Case("embedding", updates=(_some("embedding", 3, 6),), **EMBEDDING),
        Case("experts", updates=(_some("experts", 3, 5, e=2),), **EXPERTS),
        Case("fused", updates=(_some("fused", 3, 5),), **FUSED),
        Case("bf16", updates=(_some("bf16", 3, 5),), dtype="BF16", **LINEAR),
    ]


def _some(seed: str, out: int, in_: int, r: int = 2, u: int = 3, e: int = 0, v: Array | None = None) -> Update:
    lead = (e,) if e else ()
    shapes = {"A": (*lead, r, in_), "B": (*lead, out, r), "P": (*lead, u, r, r), "v": (*lead, u)}
    made = update("tinylora", f"tinylora.{seed}", **shapes)
    return made if v is None else Update("tinylora", made.tensors | {"v": v})
