"""What layers do with an input and a weight `[out, in, *k]`, in float64 numpy, for the expected outputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray
Layer = Callable[[Array, Array], Array]
"""(x, W) -> y, without the bias."""


def apply(layer: Layer, x: Array, W: Array, b: Array | None) -> Array:
    """The layer's output, its bias added."""
    y = layer(x, W)
    if b is None:
        return y
    if layer in (convolution, transposed_convolution):
        return y + b.reshape(-1, *[1] * (y.ndim - 2))
    return y + (b[:, None] if layer is experts else b)


def linear(x: Array, W: Array) -> Array:
    """x is [..., in]."""
    return np.einsum("...i,oi->...o", x, W)


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
    """Stride 1, no padding, any number of kernel axes; in groups where W reads fewer channels than x has."""
    groups = x.shape[1] // W.shape[1]
    if groups > 1:
        pairs = zip(np.split(x, groups, axis=1), np.split(W, groups), strict=True)
        return np.concatenate([convolution(part, own) for part, own in pairs], axis=1)
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
