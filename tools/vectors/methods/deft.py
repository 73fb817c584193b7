"""DEFT: W' = W - Q right^T W + scaling * Q R, Q from the QR of P by Householder's reflections, or P itself."""

from __future__ import annotations

from typing import Any

import numpy as np
from building import BIASED, EMBEDDING, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update, update
from layers import Array


def formula(
    W: Array, b: Array | None, P: Array, R: Array | None = None, orthogonal: bool = True, scaling: float = 1.0
) -> Pair:
    """W' = W - Q right^T W + scaling * Q R."""
    Q = _householder(P) if orthogonal else P
    right = Q if orthogonal else np.maximum(P, 0)
    new = W - np.einsum("or,pr,pi->oi", Q, right, W)
    return new if R is None else new + scaling * np.einsum("or,ri->oi", Q, R), b


def _householder(P: Array) -> Array:
    """Q of P = Q T: each reflection takes a column to -sign(its first number) * its length."""
    work, Q = P.copy(), np.eye(len(P))
    for j in range(P.shape[1]):
        v = np.where(np.arange(len(P)) < j, 0.0, work[:, j])
        if not v[j + 1 :].any():
            continue
        v[j] += np.copysign(np.sqrt((v * v).sum()), v[j])
        reflection = np.eye(len(P)) - 2 * np.outer(v, v) / (v @ v)
        work, Q = reflection @ work, Q @ reflection
    return Q[:, : P.shape[1]]


def cases() -> list[Case]:
    """Both projections, with and without R, every layout."""
    return [
        Case("linear", updates=(_deft("deft.linear", 3, 5),), **BIASED),
        Case("defaults", updates=(update("deft", "deft.defaults", P=(3, 2), R=(2, 5)),), **LINEAR),
        Case("plain", updates=(_deft("deft.plain", 3, 5, orthogonal=False),), **LINEAR),
        Case("removal", updates=(_deft("deft.removal", 3, None),), **LINEAR),
        Case("plain_removal", updates=(_deft("deft.plain_removal", 3, None, orthogonal=False),), **LINEAR),
        Case("rank1", updates=(_deft("deft.rank1", 3, 5, r=1),), **LINEAR),
        Case("full_rank", updates=(_deft("deft.full_rank", 3, 5, r=3),), **LINEAR),
        Case("in_out", updates=(_deft("deft.in_out", 3, 5),), **IN_OUT),
        Case("embedding", updates=(_deft("deft.embedding", 3, 6),), **EMBEDDING),
        Case("experts", updates=(_deft("deft.experts", 3, 5, e=(2,)),), **EXPERTS),
        Case("fused", updates=(_deft("deft.fused", 3, 5),), **FUSED),
        Case("bf16", updates=(_deft("deft.bf16", 3, 5),), dtype="BF16", **LINEAR),
    ]


def _deft(seed: str, out: int, in_: int | None, r: int = 2, e: tuple[int, ...] = (), orthogonal: bool = True) -> Update:
    shapes: dict[str, Any] = {"P": (*e, out, r)} | ({} if in_ is None else {"R": (*e, r, in_)})
    made = update("deft", seed, 0.5, **shapes)
    return Update("deft", made.tensors, {**made.attributes, "orthogonal": orthogonal})
