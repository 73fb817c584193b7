"""Uni-LoRA: W' = W + B A, whose elements are scaled elements of one vector."""

from __future__ import annotations

import numpy as np
from building import BIASED, EMBEDDING, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update
from container import numbers
from layers import Array


def formula(
    W: Array, b: Array | None, theta: Array, indices_A: Array, scales_A: Array, indices_B: Array, scales_B: Array
) -> Pair:
    """W' = W + sum over r of B[:, r] A[r]."""
    W = W.copy()
    for o in range(W.shape[0]):
        for i in range(W.shape[1]):
            for r in range(len(indices_A)):
                W[o, i] += (theta[indices_B[o, r]] * scales_B[o, r]) * (theta[indices_A[r, i]] * scales_A[r, i])
    return W, b


def cases() -> list[Case]:
    """A vector of one number, one that two targets share, every layout."""
    theta = numbers("unilora.theta", 4)
    return [
        Case("linear", updates=(_some("linear", 3, 5),), **BIASED),
        Case("single", updates=(_some("single", 3, 5, d=1),), **LINEAR),
        Case("long", updates=(_some("long", 3, 5, d=30),), **LINEAR),
        Case("int32", updates=(_some("int32", 3, 5, kind="int32"),), **LINEAR),
        Case("shared_one", updates=(_some("shared_one", 3, 5, theta=theta),), **LINEAR),
        Case("shared_two", updates=(_some("shared_two", 3, 5, theta=theta),), **LINEAR),
        Case("in_out", updates=(_some("in_out", 3, 5),), **IN_OUT),
        Case("embedding", updates=(_some("embedding", 3, 6),), **EMBEDDING),
        Case("experts", updates=(_some("experts", 3, 5, e=2),), **EXPERTS),
        Case("fused", updates=(_some("fused", 3, 5),), **FUSED),
        Case("bf16", updates=(_some("bf16", 3, 5),), dtype="BF16", **LINEAR),
    ]


def _some(
    seed: str, out: int, in_: int, r: int = 2, d: int = 4, e: int = 0, theta: Array | None = None, kind: str = "int64"
) -> Update:
    rng = np.random.default_rng(len(seed) + 13)
    lead = (e,) if e else ()
    tensors = {"theta": numbers(f"unilora.{seed}.theta", *lead, d) if theta is None else theta}
    for name, shape in (("A", (*lead, r, in_)), ("B", (*lead, out, r))):
        tensors[f"indices_{name}"] = rng.integers(0, d, shape).astype(kind)
        tensors[f"scales_{name}"] = numbers(f"unilora.{seed}.scales_{name}", *shape, positive=True)
    return Update("unilora", tensors)
