"""SHiRA: a few elements of W grow by a value each."""

from __future__ import annotations

import numpy as np
from building import BIASED, EMBEDDING, EXPERTS, FUSED, FUSED_IN_OUT, IN_OUT, LINEAR, Case, Pair, Update
from container import numbers
from layers import Array


def formula(W: Array, b: Array | None, index: Array, values: Array) -> Pair:
    """One element after the other."""
    W = W.copy()
    for row, column, value in zip(*index, values, strict=True):
        W[row, column] += value
    return W, b


def cases() -> list[Case]:
    """One position, all of them, every layout."""
    return [
        Case("linear", updates=(_some("linear", 3, 5),), **BIASED),
        Case("one", updates=(_some("one", 3, 5, n=1),), **LINEAR),
        Case("all", updates=(_some("all", 3, 5, n=15),), **LINEAR),
        Case("int32", updates=(_some("int32", 3, 5, kind="int32"),), **LINEAR),
        Case("in_out", updates=(_some("in_out", 3, 5),), **IN_OUT),
        Case("embedding", updates=(_some("embedding", 3, 6),), **EMBEDDING),
        Case("experts", updates=(_some("experts", 3, 5, e=2),), **EXPERTS),
        Case("fused", updates=(_some("fused", 3, 5),), **FUSED),
        Case("fused_in_out", updates=(_some("fused_in_out", 3, 5),), **FUSED_IN_OUT),
        Case("bf16", updates=(_some("bf16", 3, 5),), dtype="BF16", **LINEAR),
    ]


def _some(seed: str, out: int, in_: int, n: int = 4, e: int = 0, kind: str = "int64") -> Update:
    rng = np.random.default_rng(len(seed) + 3)
    lists = [rng.permutation(out * in_)[:n] for _ in range(max(e, 1))]
    index = np.stack([np.stack(np.divmod(flat, in_)) for flat in lists]).astype(kind)
    lead = (e,) if e else ()
    return Update("shira", {"index": index if e else index[0], "values": numbers(f"shira.{seed}", *lead, n)})
