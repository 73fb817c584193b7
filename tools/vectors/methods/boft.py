"""BOFT: W' = s * (P_m' C_m' P_m'^T ... P_0 C_0 P_0^T W^T)^T with Cayley transforms C in blocks."""

from __future__ import annotations

import numpy as np
from building import BIASED, CONV2D, EMBEDDING, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update, update
from exact import block_diagonal, exact, eye, floats, inverse
from layers import Array


def formula(W: Array, b: Array | None, R: Array, s: Array) -> Pair:
    """Every factor as a whole matrix, permutations as matrices too."""
    flat = exact(W.reshape(len(W), -1)).T
    factors, _, size, _ = R.shape
    for i, blocks in enumerate(R):
        skews = [(exact(block) - exact(block.T)) / 2 for block in blocks]
        C = block_diagonal([(eye(size) - Q) @ inverse(eye(size) + Q) for Q in skews])
        P = eye(len(flat)) if factors == 1 else _permutation(len(flat), size * 2**i, size // 2)
        flat = P @ C @ P.T @ flat
    return floats(flat.T).reshape(W.shape) * s.reshape(-1, *[1] * (W.ndim - 1)), b


def _permutation(width: int, run: int, chunk: int) -> Array:
    """Row after row of the identity: of every run first the even chunks, then the odd ones."""
    order = np.arange(width).reshape(-1, run // chunk, chunk)
    order = np.concatenate([order[:, 0::2], order[:, 1::2]], axis=1).reshape(-1)
    return eye(width)[order]


def cases() -> list[Case]:
    """One to three factors, several sizes of blocks, every layer."""
    return [
        Case("linear", updates=(_boft("boft.linear", 1, 1, 5, 3),), **BIASED),
        Case("blocks", updates=(_boft("boft.blocks", 1, 2, 3, 3),), weight=(3, 6), x=(2, 6)),
        Case("two", updates=(_boft("boft.two", 2, 2, 2, 3),), weight=(3, 4), x=(2, 4)),
        Case("two_of_four", updates=(_boft("boft.two4", 2, 2, 4, 2),), weight=(2, 8), x=(2, 8)),
        Case("three", updates=(_boft("boft.three", 3, 4, 2, 2),), weight=(2, 8), x=(2, 8)),
        Case("two_longer", updates=(_boft("boft.longer", 2, 4, 2, 2),), weight=(2, 8), x=(2, 8)),
        Case("conv2d", updates=(_boft("boft.conv2d", 2, 2, 6, 3),), **CONV2D),
        Case("in_out", updates=(_boft("boft.in_out", 1, 1, 5, 3),), **IN_OUT),
        Case("embedding", updates=(_boft("boft.embedding", 1, 3, 2, 3),), **EMBEDDING),
        Case("experts", updates=(update("boft", "boft.experts", R=(2, 1, 1, 5, 5), s=(2, 3)),), **EXPERTS),
        Case("fused", updates=(_boft("boft.fused", 1, 1, 5, 3),), **FUSED),
        Case("bf16", updates=(_boft("boft.bf16", 1, 1, 5, 3),), dtype="BF16", **LINEAR),
    ]


def _boft(seed: str, factors: int, blocks: int, size: int, out: int) -> Update:
    return update("boft", seed, R=(factors, blocks, size, size), s=(out,))
