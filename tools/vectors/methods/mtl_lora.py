"""MTL-LoRA for one task: W' = W + scaling * (sum_i w_i B_i) diag(values) A, w = softmax(weights / sharpness)."""

from __future__ import annotations

from typing import Any

import numpy as np
from building import BIASED, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update, update
from layers import Array


def formula(
    W: Array, b: Array | None, A: Array, B: Array, values: Array, weights: Array, scaling: float = 1.0,
    sharpness: float = 0.05,
) -> Pair:  # fmt: skip
    """Each up-projection by its share."""
    shares = np.exp(weights / sharpness)
    for each, share in zip(B, shares / shares.sum(), strict=True):
        W = W + scaling * share * np.einsum("or,r,ri->oi", each, values, A)
    return W, b


def cases() -> list[Case]:
    """One up-projection and several, layouts, experts, slices."""
    return [
        Case("linear", updates=(_update("linear"),), **BIASED),
        Case("sharp", updates=(_update("sharp", sharpness=2.0, scaling=0.5),), **LINEAR),
        Case("one", updates=(_update("one", n=1, sharpness=1.0),), **LINEAR),
        Case("in_out", updates=(_update("in_out", scaling=-2.0, sharpness=1.5),), **IN_OUT),
        Case("fused", updates=(_update("fused", sharpness=1.5),), **FUSED),
        Case("experts", updates=(_update("experts", 2, sharpness=1.5),), **EXPERTS),
    ]


def _update(seed: str, *e: int, n: int = 3, **attributes: Any) -> Update:
    shapes = {"A": (2, 5), "B": (n, 3, 2), "values": (2,), "weights": (n,)}
    made = update("mtl_lora", f"mtl_lora.{seed}", **{field: (*e, *shape) for field, shape in shapes.items()})
    return Update(made.method, made.tensors, attributes)
