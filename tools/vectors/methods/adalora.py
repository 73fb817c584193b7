"""AdaLoRA: W' = W + scaling * B @ diag(E) @ A."""

from __future__ import annotations

import numpy as np
from building import BIASED, CONV1D, CONV2D, EMBEDDING, EXPERTS, FUSED, IN_OUT, LINEAR, TRANSPOSED, Case, Pair, Update
from building import update as made
from layers import Array


def formula(W: Array, b: Array | None, A: Array, B: Array, E: Array, scaling: float = 1.0) -> Pair:
    """W' = W + scaling * sum_r B[o, r] E[r] A[r, c]."""
    return W + scaling * np.einsum("or,r,rc->oc", B, E, A).reshape(W.shape), b


def cases() -> list[Case]:
    """Every layer and layout, and a weight that lost all of its rank."""
    return [
        Case("linear", updates=(_svd("linear", 3, 5),), **BIASED),
        Case("default_scaling", updates=(_svd("default", 3, 5, scaling=None),), **LINEAR),
        Case("rank1", updates=(_svd("rank1", 3, 5, r=1),), **LINEAR),
        Case("rank0", updates=(_svd("rank0", 3, 5, r=0),), **LINEAR),
        Case("conv1d", updates=(_svd("conv1d", 3, 6),), **CONV1D),
        Case("conv2d", updates=(_svd("conv2d", 3, 12),), **CONV2D),
        Case("transposed", updates=(_svd("transposed", 3, 12),), **TRANSPOSED),
        Case("in_out", updates=(_svd("in_out", 3, 5),), **IN_OUT),
        Case("embedding", updates=(_svd("embedding", 3, 6),), **EMBEDDING),
        Case("experts", updates=(_svd("experts", 3, 5, e=(2,)),), **EXPERTS),
        Case("fused", updates=(_svd("fused", 3, 5),), **FUSED),
        Case("bf16", updates=(_svd("bf16", 3, 5),), dtype="BF16", **LINEAR),
    ]


def _svd(seed: str, out: int, columns: int, r: int = 2, scaling: float | None = 0.5, e: tuple[int, ...] = ()) -> Update:
    return made("adalora", f"adalora.{seed}", scaling, A=(*e, r, columns), B=(*e, out, r), E=(*e, r))
