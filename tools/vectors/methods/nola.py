"""NOLA: W' = W + scaling * B A, A and B sums of random matrices: drawn from seeds, number by number, or stored."""

from __future__ import annotations

from typing import Any

import numpy as np
from building import (
    BIASED,
    CONV2D,
    EMBEDDING,
    EXPERTS,
    FUSED,
    IN_OUT,
    LINEAR,
    TRANSPOSED,
    Case,
    Pair,
    Update,
)
from container import numbers
from layers import Array

WORD = 1 << 32


def formula(
    W: Array,
    b: Array | None,
    alpha: Array,
    beta: Array,
    seeds: Array | None = None,
    A_bases: Array | None = None,
    B_bases: Array | None = None,
    A0: Array | None = None,
    B0: Array | None = None,
    scaling: float = 1.0,
) -> Pair:
    """W' = W + scaling * (B0 + sum beta_i B_i / sqrt(q)) (A0 + sum alpha_i A_i / sqrt(p))."""
    columns = W.reshape(len(W), -1).shape[1]
    if seeds is not None:
        A_bases = np.array([[_row(int(s), n, 0, columns) for s in seeds] for n in range(len(alpha))])
        B_bases = np.array([[_row(int(s), n, 1, len(W)) for s in seeds] for n in range(len(beta))]).swapaxes(1, 2)
    assert A_bases is not None
    assert B_bases is not None
    A = sum(a * base.reshape(base.shape[0], -1) for a, base in zip(alpha, A_bases, strict=True)) / np.sqrt(len(alpha))
    B = sum(c * base for c, base in zip(beta, B_bases, strict=True)) / np.sqrt(len(beta))
    A = A if A0 is None else A + A0.reshape(A0.shape[0], -1)
    B = B if B0 is None else B + B0
    return W + scaling * np.einsum("or,rc->oc", B, A).reshape(W.shape), b


def _row(seed: int, n: int, stream: int, count: int) -> list[float]:
    """The numbers of vector n of a seed."""
    words = [w for i in range((count + 3) // 4) for w in _philox([i, n, stream, 0], [seed % WORD, seed // WORD])]
    return [word / 2**31 - 1 for word in words[:count]]


def _philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32 with ten rounds."""
    for _ in range(10):
        high = [0xD2511F53 * counter[0] // WORD, 0xCD9E8D57 * counter[2] // WORD]
        low = [0xD2511F53 * counter[0] % WORD, 0xCD9E8D57 * counter[2] % WORD]
        counter = [high[1] ^ counter[1] ^ key[0], low[1], high[0] ^ counter[3] ^ key[1], low[0]]
        key = [(key[0] + 0x9E3779B9) % WORD, (key[1] + 0xBB67AE85) % WORD]
    return counter


def cases() -> list[Case]:
    """Seeds and stored bases, starts, every layer and layout."""
    return [
        Case("linear", updates=(_drawn("nola.linear", [7, 7 + (5 << 32)]),), **BIASED),
        Case("default_scaling", updates=(_drawn("nola.default", [11], scaling=None),), **LINEAR),
        Case("one_basis", updates=(_drawn("nola.one", [3, 4], p=1, q=1),), **LINEAR),
        Case("starts", updates=(_drawn("nola.starts", [9, 1], A0=(2, 5), B0=(3, 2)),), **LINEAR),
        Case("stored", updates=(_stored("nola.stored", 3, 5),), **LINEAR),
        Case("stored_starts", updates=(_stored("nola.stored_starts", 3, 5, A0=(2, 5), B0=(3, 2)),), **LINEAR),
        Case("conv2d", updates=(_drawn("nola.conv2d", [21, 22]),), **CONV2D),
        Case("stored_conv2d", updates=(_stored("nola.stored_conv2d", 3, 2, 2, 3),), **CONV2D),
        Case("transposed", updates=(_drawn("nola.transposed", [31]),), **TRANSPOSED),
        Case("in_out", updates=(_drawn("nola.in_out", [41, 42]),), **IN_OUT),
        Case("embedding", updates=(_drawn("nola.embedding", [51, 52]),), **EMBEDDING),
        Case("experts", updates=(_drawn("nola.experts", [[61, 62], [63, 64]], e=(2,)),), **EXPERTS),
        Case("fused", updates=(_drawn("nola.fused", [71, 72]),), **FUSED),
        Case("f32", updates=(_stored("nola.f32", 3, 5),), dtype="F32", **LINEAR),
    ]


def _drawn(
    seed: str,
    seeds: Any,
    p: int = 3,
    q: int = 2,
    e: tuple[int, ...] = (),
    scaling: float | None = 0.5,
    **starts: tuple[int, ...],
) -> Update:
    tensors = {
        "alpha": numbers(f"{seed}.alpha", *e, p),
        "beta": numbers(f"{seed}.beta", *e, q),
        "seeds": np.array(seeds, dtype=np.int64),
    }
    return _update(seed, tensors, scaling, starts)


def _stored(seed: str, out: int, *ins: int, scaling: float = 0.5, **starts: tuple[int, ...]) -> Update:
    shapes = {"alpha": (3,), "beta": (2,), "A_bases": (3, 2, *ins), "B_bases": (2, out, 2)}
    tensors = {name: numbers(f"{seed}.{name}", *shape) for name, shape in shapes.items()}
    return _update(seed, tensors, scaling, starts)


def _update(seed: str, tensors: dict[str, Array], scaling: float | None, starts: dict[str, tuple[int, ...]]) -> Update:
    begun = {name: numbers(f"{seed}.{name}", *shape) for name, shape in starts.items()}
    return Update("nola", tensors | begun, {} if scaling is None else {"scaling": scaling})
