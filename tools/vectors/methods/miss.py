"""MiSS: W'[o, i] = W[o, i] + block[i mod r, o], or mini[i mod r, o mod m]."""

from __future__ import annotations

from building import BIASED, EMBEDDING, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, update
from layers import Array


def formula(W: Array, b: Array | None, D: Array | None = None, mini: Array | None = None) -> Pair:
    """W' = W + the block, repeated."""
    block = mini if D is None else D
    assert block is not None
    W = W.copy()
    for o in range(W.shape[0]):
        for i in range(W.shape[1]):
            W[o, i] += block[i % block.shape[0], o % block.shape[1]]
    return W, b


def cases() -> list[Case]:
    """Both forms, ranks that divide the inputs or do not, every layout."""
    return [
        Case("linear", updates=(update("miss", "miss.linear", D=(2, 3)),), **BIASED),
        Case("whole", updates=(update("miss", "miss.whole", D=(5, 3)),), **LINEAR),
        Case("mini", updates=(update("miss", "miss.mini", mini=(2, 1)),), **LINEAR),
        Case("mini_wide", updates=(update("miss", "miss.mini_wide", mini=(3, 2)),), weight=(4, 5)),
        Case("in_out", updates=(update("miss", "miss.in_out", D=(2, 3)),), **IN_OUT),
        Case("embedding", updates=(update("miss", "miss.embedding", D=(2, 3)),), **EMBEDDING),
        Case("experts", updates=(update("miss", "miss.experts", D=(2, 2, 3)),), **EXPERTS),
        Case("fused", updates=(update("miss", "miss.fused", D=(2, 3)),), **FUSED),
        Case("bf16", updates=(update("miss", "miss.bf16", D=(2, 3)),), dtype="BF16", **LINEAR),
    ]
