"""FourierFT: W' = W + scaling * Re(ifft2(F)), every coefficient being a cosine over the weight."""

from __future__ import annotations

import numpy as np
from building import BIASED, EMBEDDING, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update
from container import numbers
from layers import Array


def formula(
    W: Array, b: Array | None, index: Array, spectrum: Array, outputs: int, inputs: int, scaling: float = 1.0
) -> Pair:
    """W' = W + scaling / (outputs * inputs) * sum over j of spectrum[j] * cos(2 pi (u o / outputs + v i / inputs))."""
    o, i = np.arange(outputs)[:, None], np.arange(inputs)[None, :]
    D = np.zeros((outputs, inputs))
    for (u, v), c in zip(index.T, spectrum, strict=True):
        D += c * np.cos(2 * np.pi * ((u * o % outputs) / outputs + (v * i % inputs) / inputs))
    return W + scaling * D / (outputs * inputs), b


def cases() -> list[Case]:
    """The constant coefficient, the last one, every layout."""
    return [
        Case("linear", updates=(_some("linear", 3, 5),), **BIASED),
        Case("default_scaling", updates=(_some("default", 3, 5, scaling=None),), **LINEAR),
        Case("one", updates=(_some("one", 3, 5, n=1),), **LINEAR),
        Case("all", updates=(_some("all", 3, 5, n=15),), **LINEAR),
        Case("even", updates=(_some("even", 4, 6),), weight=(4, 6), x=(2, 6)),
        Case("int32", updates=(_some("int32", 3, 5, kind="int32"),), **LINEAR),
        Case("in_out", updates=(_some("in_out", 3, 5),), **IN_OUT),
        Case("embedding", updates=(_some("embedding", 3, 6),), **EMBEDDING),
        Case("experts", updates=(_some("experts", 3, 5, e=2),), **EXPERTS),
        Case("fused", updates=(_some("fused", 3, 5),), **FUSED),
        Case("bf16", updates=(_some("bf16", 3, 5),), dtype="BF16", **LINEAR),
    ]


def _some(
    seed: str, out: int, in_: int, n: int = 4, scaling: float | None = 0.5, e: int = 0, kind: str = "int64"
) -> Update:
    rng = np.random.default_rng(len(seed) + 7)
    lists = [rng.permutation(out * in_)[:n] for _ in range(max(e, 1))]
    index = np.stack([np.stack(np.divmod(flat, in_)) for flat in lists]).astype(kind)
    lead = (e,) if e else ()
    tensors = {"index": index if e else index[0], "spectrum": numbers(f"fourierft.{seed}", *lead, n)}
    attributes = {"outputs": out, "inputs": in_} | ({} if scaling is None else {"scaling": scaling})
    return Update("fourierft", tensors, attributes)
