"""Every method's formula a second time, in float64 numpy, straight from its entry in `spec/methods/`.

`W` is `[out, in, *k]`, `b` is `[out]` or None. And what layers do with the result, for the expected outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray
Pair = tuple[Array, Array | None]


def lora(W: Array, b: Array | None, scaling: float, A: Array, B: Array, bias: Array | None = None) -> Pair:
    """W' = W + scaling * B A, b' = b + scaling * bias."""
    W = W + scaling * np.einsum("or,ri->oi", B, A.reshape(len(A), -1)).reshape(W.shape)
    return W, b if bias is None else b + scaling * bias


def dora(W: Array, b: Array | None, scaling: float, A: Array, B: Array, magnitude: Array) -> Pair:
    """W'[o] = magnitude[o] * V[o] / |V[o]|."""
    V, _ = lora(W, None, scaling, A, B)
    return np.stack([m * v / np.sqrt((v * v).sum()) for m, v in zip(magnitude, V, strict=True)]), b


def ia3(W: Array, b: Array | None, l: Array | None = None, l_in: Array | None = None) -> Pair:  # noqa: E741
    """Scales rows and bias by l, or columns by l_in."""
    W = W.copy()
    if l is not None:
        for o, scale in enumerate(l):
            W[o] *= scale
        return W, None if b is None else l * b
    for i, scale in enumerate(l_in):
        W[:, i] *= scale
    return W, b


def dense(W: Array, b: Array | None, scaling: float, D: Array | None = None, d: Array | None = None) -> Pair:
    """W' = W + scaling * D, b' = b + scaling * d."""
    return W if D is None else W + scaling * D, b if d is None else b + scaling * d


def replacement(W: Array, b: Array | None, weight: Array | None = None, bias: Array | None = None) -> Pair:
    """W' = weight, b' = bias."""
    return W if weight is None else weight, b if bias is None else bias


def rows(W: Array, b: Array | None, index: Array, values: Array) -> Pair:
    """W'[:, index[j]] = values[j]."""
    W = W.copy()
    for position, value in zip(index, values, strict=True):
        W[:, position] = value
    return W, b


FORMULAS: dict[str, Callable[..., Pair]] = {
    "dense": dense,
    "dora": dora,
    "ia3": ia3,
    "lora": lora,
    "replacement": replacement,
    "rows": rows,
}


def linear(x: Array, W: Array) -> Array:
    """x is [n, in]."""
    return np.einsum("ni,oi->no", x, W)


def experts(x: Array, W: Array) -> Array:
    """x is [e, n, in]."""
    return np.einsum("eni,eoi->eno", x, W)


def gain(x: Array, W: Array) -> Array:
    """x is [n, out]; what a norm does with its weight."""
    return x * W


def embedding(x: Array, W: Array) -> Array:
    """x holds token numbers."""
    return np.stack([W[:, token] for token in x])


def convolution(x: Array, W: Array) -> Array:
    """Stride 1, no padding, any number of kernel axes."""
    kernel = W.shape[2:]
    sizes = [n - k + 1 for n, k in zip(x.shape[2:], kernel, strict=True)]
    y = np.zeros((len(x), len(W), *sizes))
    for at in np.ndindex(*kernel):
        window = x[(..., *(slice(a, a + n) for a, n in zip(at, sizes, strict=True)))]
        y += np.einsum("nc...,oc->no...", window, W[(..., *at)])
    return y


def transposed_convolution(x: Array, W: Array) -> Array:
    """Stride 1, no padding, two kernel axes; W is `[out, in, h, w]` here too."""
    _, _, height, width = W.shape
    y = np.zeros((len(x), len(W), x.shape[2] + height - 1, x.shape[3] + width - 1))
    for i, j in np.ndindex(height, width):
        y[:, :, i : i + x.shape[2], j : j + x.shape[3]] += np.einsum("nchw,oc->nohw", x, W[:, :, i, j])
    return y
