"""DoRA on outputs: W'[o] = f[o] * (W + scaling * B A)[o] and b'[o] = f[o] * b[o], f = magnitude / |W + B A|."""

from __future__ import annotations

from typing import Any

import numpy as np
from building import BIASED, CONV2D, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update, low_rank
from container import numbers
from layers import Array

from methods import lora


def formula(
    W: Array, b: Array | None, A: Array, B: Array, magnitude: Array, factors: Array | None = None, scaling: float = 1.0
) -> Pair:
    """Output by output."""
    whole, _ = lora.formula(W, None, A, B, scaling=1.0)
    scaled, _ = lora.formula(W, None, A, B, scaling=scaling)
    if factors is None:
        factors = np.array([m / np.sqrt((v * v).sum()) for m, v in zip(magnitude, whole, strict=True)])
    new = np.stack([f * v for f, v in zip(factors, scaled, strict=True)])
    return new, None if b is None else b * factors


def cases() -> list[Case]:
    """With a bias and without one, every layout, scalings of 1 and others."""
    return [
        Case("biased", updates=(_made("dora_outputs.biased", 3, 5),), **BIASED),
        Case("linear", updates=(_made("dora_outputs.linear", 3, 5),), **LINEAR),
        Case("default_scaling", updates=(_made("dora_outputs.default", 3, 5, scaling=None),), **BIASED),
        Case("conv2d", updates=(_made("dora_outputs.conv2d", 3, 2, 2, 3),), **CONV2D),
        Case("factors", updates=(_made("dora_outputs.factors", 3, 5, factors=numbers("dora_outputs.f", 3)),), **BIASED),
        Case("in_out", updates=(_made("dora_outputs.in_out", 3, 5),), **IN_OUT),
        Case("experts", updates=(_made("dora_outputs.experts", 3, 5, e=2),), **EXPERTS),
        Case("fused", updates=(_made("dora_outputs.fused", 3, 5),), **FUSED),
        Case("bf16", updates=(_made("dora_outputs.bf16", 3, 5),), dtype="BF16", **BIASED),
    ]


def _made(seed: str, out: int, *ins: int, e: int | None = None, **options: Any) -> Update:
    shape = (out,) if e is None else (e, out)
    magnitude = numbers(f"{seed}.m", *shape, positive=True)
    return low_rank("dora_outputs", seed, out, *ins, e=e, magnitude=magnitude, **options)
