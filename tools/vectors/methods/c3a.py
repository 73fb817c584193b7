"""C3A: W' = W + circulant blocks over in."""

from __future__ import annotations

from building import EMBEDDING, EXPERTS, FUSED, Case, Pair, update
from layers import Array


def formula(W: Array, b: Array | None, kernel: Array) -> Pair:
    """Every row of a block is the one above it, moved one place to the right."""
    W, size = W.copy(), kernel.shape[2]
    for o in range(W.shape[0]):
        for i in range(W.shape[1]):
            W[o, i] += kernel[o // size, i // size, (i % size - o % size) % size] / W.shape[1]
    return W, b


def cases() -> list[Case]:
    """Blocks of one element and of several, one block, every layout."""
    wide = {"weight": (4, 6), "x": (2, 6)}
    return [
        Case("linear", updates=(update("c3a", "c3a.linear", kernel=(2, 3, 2)),), bias=(4,), **wide),
        Case("single", updates=(update("c3a", "c3a.single", kernel=(4, 6, 1)),), **wide),
        Case("one", updates=(update("c3a", "c3a.one", kernel=(1, 2, 3)),), weight=(3, 6), x=(2, 6)),
        Case("in_out", updates=(update("c3a", "c3a.in_out", kernel=(2, 3, 2)),), weight=(6, 4), layout="in out *k",
             x=(2, 6)),
        Case("embedding", updates=(update("c3a", "c3a.embedding", kernel=(1, 2, 3)),), **EMBEDDING),
        Case("experts", updates=(update("c3a", "c3a.experts", kernel=(2, 3, 5, 1)),), **EXPERTS),
        Case("fused", updates=(update("c3a", "c3a.fused", kernel=(3, 5, 1)),), **FUSED),
        Case("bf16", updates=(update("c3a", "c3a.bf16", kernel=(2, 3, 2)),), dtype="BF16", **wide),
    ]  # fmt: skip
