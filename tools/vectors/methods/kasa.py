"""KaSA: W' = W on the subspace of its largest singular values + scaling * B diag A."""

from __future__ import annotations

import numpy as np
from building import BIASED, EMBEDDING, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update, low_rank
from container import numbers
from layers import Array


def formula(W: Array, b: Array | None, A: Array, B: Array, diag: Array, scaling: float = 1.0) -> Pair:
    """The subspace is spanned by eigenvectors of W W^T or W^T W, whichever is smaller."""
    kept = min(W.shape) - len(A)
    return cut(W, kept) + scaling * np.einsum("or,r,ri->oi", B, diag, A), b


def cut(W: Array, kept: int) -> Array:
    """W with its `kept` largest singular values alone."""
    if W.shape[0] > W.shape[1]:
        return cut(W.T, kept).T
    _, vectors = np.linalg.eigh(W @ W.T)
    largest = vectors[:, len(W) - kept :]
    return largest @ (largest.T @ W)


def cases() -> list[Case]:
    """Wide and tall weights, every layout."""
    return [
        Case("linear", updates=(_kasa("kasa.linear", 3, 5),), **BIASED),
        Case("default_scaling", updates=(_kasa("kasa.default", 3, 5, scaling=None),), **LINEAR),
        Case("rank1", updates=(_kasa("kasa.rank1", 3, 5, r=1),), **LINEAR),
        Case("tall", updates=(_kasa("kasa.tall", 6, 4),), weight=(6, 4), x=(2, 4)),
        Case("in_out", updates=(_kasa("kasa.in_out", 3, 5),), **IN_OUT),
        Case("embedding", updates=(_kasa("kasa.embedding", 3, 6),), **EMBEDDING),
        Case("experts", updates=(_kasa("kasa.experts", 3, 5, e=2),), **EXPERTS),
        Case("fused", updates=(_kasa("kasa.fused", 3, 5),), **FUSED),
        Case("bf16", updates=(_kasa("kasa.bf16", 3, 5),), dtype="BF16", **LINEAR),
    ]


def _kasa(seed: str, out: int, in_: int, r: int = 2, e: int | None = None, scaling: float | None = 0.5) -> Update:
    diag = numbers(f"{seed}.diag", *(() if e is None else (e,)), r)
    return low_rank("kasa", seed, out, in_, r=r, e=e, scaling=scaling, diag=diag)
