"""IA3 as LyCORIS has it: W' = W * (1 + w)."""

from __future__ import annotations

import numpy as np
from building import BIASED, CONV1D, CONV2D, EMBEDDING, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update, update
from layers import Array


def formula(
    W: Array, b: Array | None, w: Array | None = None, w_in: Array | None = None, on_output: bool = False
) -> Pair:
    """W' = W + w * W along one axis, and of outputs b' = b + w * b where it is so."""
    if w is not None:
        b = b + w * b if on_output and b is not None else b
        return W + np.einsum("o,o...->o...", w, W), b
    return W + np.einsum("i,oi...->oi...", w_in, W), b


def cases() -> list[Case]:
    """Both sides, at every layer and layout."""
    return [
        Case("linear", updates=(update("ia3_weights", "ia3w.linear", w=(3,)),), **BIASED),
        Case("inputs", updates=(update("ia3_weights", "ia3w.inputs", w_in=(5,)),), **BIASED),
        Case("on_output", updates=(_on_output("on_output", w=(3,)),), **BIASED),
        Case("on_output_inputs", updates=(_on_output("on_output_in", w_in=(5,)),), **BIASED),
        Case("conv1d", updates=(update("ia3_weights", "ia3w.conv1d", w=(3,)),), **CONV1D),
        Case("conv2d", updates=(update("ia3_weights", "ia3w.conv2d", w_in=(2,)),), **CONV2D),
        Case("in_out", updates=(update("ia3_weights", "ia3w.in_out", w=(3,)),), **IN_OUT),
        Case("embedding", updates=(update("ia3_weights", "ia3w.embedding", w_in=(6,)),), **EMBEDDING),
        Case("experts", updates=(update("ia3_weights", "ia3w.experts", w=(2, 3)),), **EXPERTS),
        Case("fused", updates=(update("ia3_weights", "ia3w.fused", w=(3,)),), **FUSED),
        Case("bf16", updates=(update("ia3_weights", "ia3w.bf16", w=(3,)),), dtype="BF16", **LINEAR),
    ]


def _on_output(seed: str, **shapes: tuple[int, ...]) -> Update:
    made = update("ia3_weights", f"ia3w.{seed}", **shapes)
    return Update(made.method, made.tensors, {"on_output": True})
