"""WaveFT: W' = W + scaling * idwt2(F): upsampling, two filters, and a cut of the borders, along each axis in turn."""

from __future__ import annotations

import numpy as np
from building import BIASED, EMBEDDING, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update
from container import numbers
from layers import Array


def formula(
    W: Array, b: Array | None, index: Array, spectrum: Array, outputs: int, inputs: int, low_pass: Array | None = None,
    scaling: float = 1.0,
) -> Pair:  # fmt: skip
    """W' = W + scaling * the inverse transform of F, padded; F itself without a filter."""
    border = 0 if low_pass is None else len(low_pass) - 2
    sizes = [n + border + (n + border) % 2 if low_pass is not None else n for n in (outputs, inputs)]
    F = np.zeros(sizes)
    for (u, v), c in zip(index.T, spectrum, strict=True):
        F[u + (sizes[0] - outputs) // 2, v + (sizes[1] - inputs) // 2] = c
    D = F if low_pass is None else _inverse(F, low_pass)[:outputs, :inputs]
    return W + scaling * D, b


def _inverse(F: Array, low: Array) -> Array:
    """Four quarters: plain, high along the rows' axis, high along the other, high along both."""
    high = np.array([(-1) ** i * low[len(low) - 1 - i] for i in range(len(low))])
    h, w = F.shape[0] // 2, F.shape[1] // 2
    quarters = {(0, 0): F[:h, :w], (1, 0): F[:h, w:], (0, 1): F[h:, :w], (1, 1): F[h:, w:]}
    out = 0
    for (down, across), quarter in quarters.items():
        tall = np.stack([_upsampled(column, (low, high)[down]) for column in quarter.T], 1)
        out = out + np.stack([_upsampled(row, (low, high)[across]) for row in tall])
    return out


def _upsampled(line: Array, taps: Array) -> Array:
    spread = np.zeros(2 * len(line) - 1)
    spread[::2] = line
    border = len(taps) - 2
    whole = np.convolve(spread, taps)
    return whole[border : len(whole) - border]


def cases() -> list[Case]:
    """No filter, filters of 2, 4 and 6 taps, odd and even sizes, every layout."""
    return [
        Case("linear", updates=(_some("linear", 3, 5),), **BIASED),
        Case("plain", updates=(_some("plain", 3, 5, taps=0),), **LINEAR),
        Case("default_scaling", updates=(_some("default", 3, 5, scaling=None),), **LINEAR),
        Case("all", updates=(_some("all", 3, 5, n=15),), **LINEAR),
        Case("four", updates=(_some("four", 4, 6, n=24, taps=4),), weight=(4, 6), x=(2, 6)),
        Case("six", updates=(_some("six", 3, 5, n=15, taps=6),), **LINEAR),
        Case("in_out", updates=(_some("in_out", 3, 5, taps=4),), **IN_OUT),
        Case("embedding", updates=(_some("embedding", 3, 6),), **EMBEDDING),
        Case("experts", updates=(_some("experts", 3, 5, e=2, taps=4),), **EXPERTS),
        Case("fused", updates=(_some("fused", 3, 5),), **FUSED),
        Case("bf16", updates=(_some("bf16", 3, 5),), dtype="BF16", **LINEAR),
    ]


def _some(seed: str, out: int, in_: int, n: int = 4, taps: int = 2, scaling: float | None = 0.5, e: int = 0) -> Update:
    rng = np.random.default_rng(len(seed) + 11)
    lists = [rng.permutation(out * in_)[:n] for _ in range(max(e, 1))]
    index = np.stack([np.stack(np.divmod(flat, in_)) for flat in lists])
    lead = (e,) if e else ()
    tensors = {"index": index if e else index[0], "spectrum": numbers(f"waveft.{seed}", *lead, n)}
    if taps:
        tensors["low_pass"] = numbers(f"waveft.{seed}.low_pass", *lead, taps)
    attributes = {"outputs": out, "inputs": in_} | ({} if scaling is None else {"scaling": scaling})
    return Update("waveft", tensors, attributes)
