"""BD-LoRA: W' = W + scaling * B A, where A or B is block-diagonal."""

from __future__ import annotations

import numpy as np
from building import BIASED, EMBEDDING, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, update
from layers import Array


def formula(
    W: Array,
    b: Array | None,
    A_blocks: Array | None = None,
    B_blocks: Array | None = None,
    A: Array | None = None,
    B: Array | None = None,
    scaling: float = 1.0,
) -> Pair:
    """W' = W + scaling * B A."""
    A, B = (whole if blocks is None else _diagonal(blocks) for whole, blocks in ((A, A_blocks), (B, B_blocks)))
    return W + scaling * np.einsum("or,ri->oi", B, A), b


def _diagonal(blocks: Array) -> Array:
    n, rows, columns = blocks.shape
    whole = np.zeros((n * rows, n * columns))
    for position, block in enumerate(blocks):
        whole[position * rows : (position + 1) * rows, position * columns : (position + 1) * columns] = block
    return whole


def cases() -> list[Case]:
    """Both factors, several numbers of blocks, every layout."""
    A, B = {"A_blocks": (5, 1, 1), "B": (3, 5)}, {"B_blocks": (3, 1, 2), "A": (6, 5)}
    wide = {"A_blocks": (2, 2, 3), "B": (3, 4)}
    stacked = {name: (2, *shape) for name, shape in B.items()}
    return [
        Case("a_blocks", updates=(update("bdlora", "bdlora.a", 0.5, **A),), **BIASED),
        Case("b_blocks", updates=(update("bdlora", "bdlora.b", 0.5, **B),), **BIASED),
        Case("default_scaling", updates=(update("bdlora", "bdlora.default", **B),), **LINEAR),
        Case("one_block", updates=(update("bdlora", "bdlora.one", 0.5, A_blocks=(1, 2, 5), B=(3, 2)),), **LINEAR),
        Case("two_blocks", updates=(update("bdlora", "bdlora.two", 0.5, **wide),), weight=(3, 6), x=(2, 6)),
        Case("in_out", updates=(update("bdlora", "bdlora.in_out", 0.5, **A),), **IN_OUT),
        Case("embedding", updates=(update("bdlora", "bdlora.embedding", 0.5, **wide),), **EMBEDDING),
        Case("experts", updates=(update("bdlora", "bdlora.experts", 0.5, **stacked),), **EXPERTS),
        Case("fused", updates=(update("bdlora", "bdlora.fused", 0.5, **B),), **FUSED),
        Case("bf16", updates=(update("bdlora", "bdlora.bf16", 0.5, **A),), dtype="BF16", **LINEAR),
    ]
