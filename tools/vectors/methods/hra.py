"""HRA: W' = W (I - 2 u_1 u_1^T / |u_1|^2) ..., or W (I - 2 P) with P the projection to what all u span."""

from __future__ import annotations

from typing import Any

from building import BIASED, CONV1D, CONV2D, EMBEDDING, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update, update
from exact import exact, eye, floats, inverse
from layers import Array


def formula(W: Array, b: Array | None, u: Array, gram_schmidt: bool = False) -> Pair:
    """In fractions: lengths come in by their squares only."""
    flat, u = exact(W.reshape(len(W), -1)), exact(u)
    spaces = [u] if gram_schmidt else [u[:, i : i + 1] for i in range(u.shape[1])]
    for space in spaces:
        flat = flat @ (eye(len(u)) - 2 * space @ inverse(space.T @ space) @ space.T)
    return floats(flat).reshape(W.shape), b


def cases() -> list[Case]:
    """Chains and orthogonal reflections at every layer."""
    return [
        Case("linear", updates=(_hra("hra.linear", 5, 2),), **BIASED),
        Case("one", updates=(_hra("hra.one", 5, 1),), **LINEAR),
        Case("odd", updates=(_hra("hra.odd", 5, 3, gram_schmidt=False),), **LINEAR),
        Case("orthogonal", updates=(_hra("hra.orthogonal", 5, 3, gram_schmidt=True),), **LINEAR),
        Case("conv1d", updates=(_hra("hra.conv1d", 6, 2),), **CONV1D),
        Case("conv2d", updates=(_hra("hra.conv2d", 12, 4, gram_schmidt=True),), **CONV2D),
        Case("in_out", updates=(_hra("hra.in_out", 5, 2),), **IN_OUT),
        Case("embedding", updates=(_hra("hra.embedding", 6, 2),), **EMBEDDING),
        Case("experts", updates=(update("hra", "hra.experts", u=(2, 5, 2)),), **EXPERTS),
        Case("fused", updates=(_hra("hra.fused", 5, 2),), **FUSED),
        Case("bf16", updates=(_hra("hra.bf16", 5, 2),), dtype="BF16", **LINEAR),
    ]


def _hra(seed: str, columns: int, r: int, **attributes: Any) -> Update:
    return Update("hra", update("hra", seed, u=(columns, r)).tensors, attributes)
