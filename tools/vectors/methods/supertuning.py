"""Super-Tuning: a few elements of W, counted row by row, grow by a value each; and a LoRA beside them."""

from __future__ import annotations

import numpy as np
from building import BIASED, EMBEDDING, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update
from container import numbers
from layers import Array


def formula(
    W: Array, b: Array | None, index: Array, values: Array, A: Array | None = None, B: Array | None = None,
    scaling: float = 1.0,
) -> Pair:  # fmt: skip
    """One element after the other, then scaling * B A."""
    new = W.flatten()
    for at, value in zip(index, values, strict=True):
        new[at] += value
    new = new.reshape(W.shape)
    return new if A is None else new + scaling * np.einsum("or,ri->oi", B, A), b


def cases() -> list[Case]:
    """Alone and with a LoRA, every layout."""
    return [
        Case("linear", updates=(_some("linear", 3, 5),), **BIASED),
        Case("hybrid", updates=(_some("hybrid", 3, 5, r=2, scaling=0.5),), **LINEAR),
        Case("default_scaling", updates=(_some("default", 3, 5, r=1),), **LINEAR),
        Case("all", updates=(_some("all", 3, 5, n=15),), **LINEAR),
        Case("int32", updates=(_some("int32", 3, 5, kind="int32"),), **LINEAR),
        Case("in_out", updates=(_some("in_out", 3, 5, r=2),), **IN_OUT),
        Case("embedding", updates=(_some("embedding", 3, 6),), **EMBEDDING),
        Case("experts", updates=(_some("experts", 3, 5, e=2, r=2),), **EXPERTS),
        Case("fused", updates=(_some("fused", 3, 5, r=2),), **FUSED),
        Case("bf16", updates=(_some("bf16", 3, 5, r=2),), dtype="BF16", **LINEAR),
    ]


def _some(
    seed: str, out: int, in_: int, n: int = 4, r: int = 0, scaling: float | None = None, e: int = 0, kind: str = "int64"
) -> Update:
    rng = np.random.default_rng(len(seed) + 5)
    index = np.stack([rng.permutation(out * in_)[:n] for _ in range(max(e, 1))]).astype(kind)
    lead = (e,) if e else ()
    tensors = {"index": index if e else index[0], "values": numbers(f"supertuning.{seed}", *lead, n)}
    if r:
        tensors["A"] = numbers(f"supertuning.{seed}.A", *lead, r, in_)
        tensors["B"] = numbers(f"supertuning.{seed}.B", *lead, out, r)
    return Update("supertuning", tensors, {} if scaling is None else {"scaling": scaling})
