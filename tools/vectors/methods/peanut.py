"""PEANuT: W' = W + scaling * B h(column), h a small network with skips, column by column."""

from __future__ import annotations

import math

import numpy as np
from building import BIASED, EMBEDDING, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update, update
from layers import Array

F = {
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: x * math.erfc(-x / math.sqrt(2)) / 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "tanh": math.tanh,
}


def formula(
    W: Array,
    b: Array | None,
    A: Array,
    B: Array,
    encoders: Array | None = None,
    decoders: Array | None = None,
    activation: str = "relu",
    scaling: float = 1.0,
) -> Pair:
    """W'[:, i] = W[:, i] + scaling * B h(W[:, i])."""
    f = np.vectorize(F[activation], otypes=[float])
    new = W.copy()
    for i in range(W.shape[1]):
        h, kept = f(A @ W[:, i]), []
        for encoder in [] if encoders is None else encoders:
            kept.append(h)
            h = f(encoder @ h)
        for decoder, before in zip([] if decoders is None else decoders, reversed(kept), strict=True):
            h = f(decoder @ h) + before
        new[:, i] += scaling * (B @ h)
    return new, b


def cases() -> list[Case]:
    """Depths, activations, every layout."""
    return [
        Case("linear", updates=(_peanut("peanut.linear", 3, 1),), **BIASED),
        Case("defaults", updates=(update("peanut", "peanut.defaults", A=(2, 3), B=(3, 2)),), **LINEAR),
        Case("deep", updates=(_peanut("peanut.deep", 3, 3, "silu"),), **LINEAR),
        Case("gelu", updates=(_peanut("peanut.gelu", 3, 1, "gelu"),), **LINEAR),
        Case("tanh", updates=(_peanut("peanut.tanh", 3, 2, "tanh"),), **LINEAR),
        Case("in_out", updates=(_peanut("peanut.in_out", 3, 1),), **IN_OUT),
        Case("embedding", updates=(_peanut("peanut.embedding", 3, 1),), **EMBEDDING),
        Case("experts", updates=(_peanut("peanut.experts", 3, 1, e=(2,)),), **EXPERTS),
        Case("fused", updates=(_peanut("peanut.fused", 3, 1),), **FUSED),
        Case("bf16", updates=(_peanut("peanut.bf16", 3, 1),), dtype="BF16", **LINEAR),
    ]


def _peanut(seed: str, out: int, n: int, activation: str = "relu", e: tuple[int, ...] = ()) -> Update:
    inner = (*e, n, 2, 2)
    made = update("peanut", seed, 0.5, A=(*e, 2, out), B=(*e, out, 2), encoders=inner, decoders=inner)
    return Update("peanut", made.tensors, {**made.attributes, "activation": activation})
