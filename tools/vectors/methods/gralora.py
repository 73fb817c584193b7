"""GraLoRA: every block of W has a LoRA of its own; and a LoRA of the whole beside them."""

from __future__ import annotations

import numpy as np
from building import EMBEDDING, EXPERTS, FUSED, Case, Pair, Update
from container import numbers
from layers import Array


def formula(
    W: Array, b: Array | None, A: Array, B: Array, A_whole: Array | None = None, B_whole: Array | None = None,
    scaling: float = 1.0,
) -> Pair:  # fmt: skip
    """Block by block."""
    D = np.zeros_like(W)
    g, width, r = A.shape
    height, q = B.shape[2], r // g
    for n in range(g):
        for j in range(g):
            down, up = A[n][:, j * q : (j + 1) * q], B[j][n * q : (n + 1) * q]
            D[j * height : (j + 1) * height, n * width : (n + 1) * width] = np.einsum("iq,qo->oi", down, up)
    if A_whole is not None:
        D = D + np.einsum("or,ri->oi", B_whole, A_whole)
    return W + scaling * D, b


def cases() -> list[Case]:
    """One block and several, the hybrid, every layout."""
    wide = {"weight": (4, 6), "x": (2, 6)}
    return [
        Case("linear", updates=(_some("linear", 4, 6),), bias=(4,), **wide),
        Case("default_scaling", updates=(_some("default", 4, 6, scaling=None),), **wide),
        Case("hybrid", updates=(_some("hybrid", 4, 6, h=3),), **wide),
        Case("one", updates=(_some("one", 3, 5, g=1, r=2),), weight=(3, 5)),
        Case("thin", updates=(_some("thin", 4, 6, r=2),), **wide),
        Case("in_out", updates=(_some("in_out", 4, 6, h=1),), weight=(6, 4), layout="in out *k", x=(2, 6)),
        Case("embedding", updates=(_some("embedding", 3, 6, g=3, r=3),), **EMBEDDING),
        Case("experts", updates=(_some("experts", 3, 5, g=1, e=2),), **EXPERTS),
        Case("fused", updates=(_some("fused", 3, 5, g=1),), **FUSED),
        Case("bf16", updates=(_some("bf16", 4, 6),), dtype="BF16", **wide),
    ]


def _some(
    seed: str, out: int, in_: int, g: int = 2, r: int = 4, h: int = 0, scaling: float | None = 0.5, e: int = 0
) -> Update:
    lead = (e,) if e else ()
    shapes = {"A": (*lead, g, in_ // g, r), "B": (*lead, g, r, out // g)}
    if h:
        shapes |= {"A_whole": (*lead, h, in_), "B_whole": (*lead, out, h)}
    tensors = {name: numbers(f"gralora.{seed}.{name}", *shape) for name, shape in shapes.items()}
    return Update("gralora", tensors, {} if scaling is None else {"scaling": scaling})
