"""MiSS in its block affine form: W' = W + W @ B + B for every block of r x r, B by the block's outputs."""

from __future__ import annotations

from building import EXPERTS, FUSED, IN_OUT, Case, Pair, update
from layers import Array


def formula(W: Array, b: Array | None, B: Array) -> Pair:
    """Number by number."""
    new, r = W.copy(), B.shape[1]
    for o in range(W.shape[0]):
        for column in range(W.shape[1]):
            block, first = B[o // r], column - column % r
            mixed = sum(W[o, first + k] * block[k, column - first] for k in range(r))
            new[o, column] += mixed + block[o % r, column - first]
    return new, b


def cases() -> list[Case]:
    """Blocks of one, several and a whole side; every layout."""
    wide = {"weight": (4, 6), "bias": (4,), "x": (2, 6)}
    return [
        Case("linear", updates=(update("miss_bat", "miss_bat.linear", B=(2, 2, 2)),), **wide),
        Case("ones", updates=(update("miss_bat", "miss_bat.ones", B=(3, 1, 1)),), weight=(3, 5), x=(2, 5)),
        Case("square", updates=(update("miss_bat", "miss_bat.square", B=(1, 3, 3)),), weight=(3, 3), x=(2, 3)),
        Case("in_out", updates=(update("miss_bat", "miss_bat.in_out", B=(3, 1, 1)),), **IN_OUT),
        Case("experts", updates=(update("miss_bat", "miss_bat.experts", B=(2, 3, 1, 1)),), **EXPERTS),
        Case("fused", updates=(update("miss_bat", "miss_bat.fused", B=(3, 1, 1)),), **FUSED),
        Case("bf16", updates=(update("miss_bat", "miss_bat.bf16", B=(2, 2, 2)),), dtype="BF16", **wide),
    ]
