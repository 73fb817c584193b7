"""GLoRA: W' = W + W * A + B, b' = b + b * D + E + W C, each support in one of its forms."""

from __future__ import annotations

import numpy as np
from building import BIASED, EMBEDDING, EXPERTS, EXPERTS_IN_OUT, FUSED, FUSED_IN_OUT, IN_OUT, LINEAR, Case, Pair, update
from layers import Array


def formula(W: Array, b: Array | None, **supports: Array) -> Pair:
    """Element by element."""
    out, in_ = W.shape
    A, B, C, D, E = (_support(name, supports, shape) for name, shape in _shapes(out, in_).items())
    new_W, new_b = W.copy(), None if b is None else b.copy()
    for o in range(out):
        for i in range(in_):
            new_W[o, i] = W[o, i] + W[o, i] * A[o, i] + B[o, i]
        if b is not None and new_b is not None:
            new_b[o] = b[o] + b[o] * D[o, 0] + E[o, 0] + sum(W[o, i] * C[i, 0] for i in range(in_))
    return new_W, new_b


def _shapes(out: int, in_: int) -> dict[str, tuple[int, int]]:
    return {"A": (out, in_), "B": (out, in_), "C": (in_, 1), "D": (out, 1), "E": (out, 1)}


def _support(name: str, supports: dict[str, Array], shape: tuple[int, int]) -> Array:
    if f"{name}_d" in supports:
        return np.einsum("ir,rj->ij", supports[f"{name}_d"], supports[f"{name}_u"])
    if f"{name}_c" in supports:
        return np.full(shape, supports[f"{name}_c"][0])
    return np.zeros(shape) if name not in supports else np.repeat(supports[name][:, None], shape[1], 1)


def cases() -> list[Case]:
    """Every form of every support, every layout."""
    low = {"A_d": (3, 2), "A_u": (2, 5), "B_d": (3, 2), "B_u": (2, 5)}
    bias = {"C_d": (5, 2), "C_u": (2, 1), "D": (3,), "E": (3,)}
    stacked = {name: (2, *shape) for name, shape in (low | bias).items()}
    token = {"A_d": (3, 2), "A_u": (2, 6), "B": (3,)}
    return [
        Case("linear", updates=(update("glora", "glora.linear", **low, **bias),), **BIASED),
        Case("unbiased", updates=(update("glora", "glora.unbiased", **low),), **LINEAR),
        Case("vectors", updates=(update("glora", "glora.vectors", A=(3,), B=(3,), C=(5,), D=(3,), E=(3,)),), **BIASED),
        Case(
            "constants", updates=(update("glora", "glora.constants", A_c=(1,), B_c=(1,), D_c=(1,), E_c=(1,)),), **BIASED
        ),
        Case("bias_only", updates=(update("glora", "glora.bias", C=(5,), D_c=(1,)),), **BIASED),
        Case("scale_only", updates=(update("glora", "glora.scale", A=(3,)),), **BIASED),
        Case("in_out", updates=(update("glora", "glora.in_out", **low, **bias),), **IN_OUT),
        Case("embedding", updates=(update("glora", "glora.embedding", **token),), **EMBEDDING),
        Case("experts", updates=(update("glora", "glora.experts", A=(2, 3), B_c=(2, 1)),), **EXPERTS),
        Case("experts_in_out", updates=(update("glora", "glora.experts_in_out", **stacked),), **EXPERTS_IN_OUT),
        Case("fused", updates=(update("glora", "glora.fused", **low, **bias),), **FUSED),
        Case("fused_in_out", updates=(update("glora", "glora.fused_in_out", A_c=(1,), **bias),), **FUSED_IN_OUT),
        Case("bf16", updates=(update("glora", "glora.bf16", **low, **bias),), dtype="BF16", **BIASED),
    ]
