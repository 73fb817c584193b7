"""DoRA across the groups of a convolution: each output's kernel over all channels, scaled to its magnitude."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from building import IN_OUT, Case, Update
from container import numbers
from layers import Array, convolution


def output(
    x: Array,
    layer: Callable[[Array], Array],
    A: Array,
    B: Array,
    magnitude: Array,
    W: Array,
    b: Array | None = None,
    scaling: float = 1.0,
    zero_padded: bool = False,  # noqa: ARG001 - layers of vectors pad nothing
    regrouped: bool = False,
) -> Array:
    """Output by output: a kernel over all channels, its norm, and the convolution with it."""
    share = B.shape[1]
    high = len(B) // (len(A) // share)
    kernels = np.zeros((len(B), *A.shape[1:]))
    for o in range(len(B)):
        group = o // high
        for j in range(share):
            kernels[o] += scaling * B[o, j] * A[group * share + j]
        start = group * W.shape[1]
        kernels[o, start : start + W.shape[1]] += W[o]
    if regrouped:
        flat, other = B.reshape(-1), np.zeros((len(B) * share // len(A), A.size // len(A)))
        for i in range(len(other)):
            for j in range(len(A)):
                other[i] += flat[i * len(A) + j] * A[j].reshape(-1)
        measured = W + scaling * other.reshape(W.shape)
    else:
        measured = kernels
    y = layer(x).copy()
    for o in range(len(B)):
        kernel = kernels[o] * magnitude[o] / np.sqrt(np.sum(measured[o] ** 2))
        whole = convolution(x, kernel[None]) if x.ndim > 2 else x @ kernel[:, None]
        y[:, o] = whole[:, 0] + (0 if b is None else b[o])
    return y


def cases() -> list[Case]:
    """One, two and three kernel axes; both norms; groups of one, of two, as many as channels, and a linear layer."""
    two: dict[str, Any] = {"weight": (4, 3, 2, 3), "bias": (4,), "x": (1, 6, 4, 5), "layer": convolution}
    wide, one = {"A": (4, 6, 2, 3), "B": (4, 2)}, {"layer": convolution}
    whole = {"A": (2, 3, 2, 2), "B": (4, 2)}
    three: dict[str, Any] = {"weight": (4, 3, 2, 2), "bias": (4,), "x": (2, 3, 4, 3), "layer": convolution}
    return [
        Case("conv2d", updates=(_made("conv2d", **wide),), **two),
        Case("default_scaling", updates=(_made("default", scaling=None, A=(2, 6, 2, 3), B=(4, 1)),), **two),
        Case("regrouped", updates=(_made("regrouped", scaling=-1.5, regrouped=True, **wide),), **two),
        Case("zero_padded", updates=(_made("zero_padded", zero_padded=True, **wide),), **two),
        Case("one_group", updates=(_made("one_group", **whole),), **three),
        Case("one_group_regrouped", updates=(_made("one_group", regrouped=True, **whole),), **three),
        Case("conv1d", (6, 2, 3), (_made("conv1d", A=(2, 4, 3), B=(6, 1)),), x=(2, 4, 5), **one),
        Case("depthwise", (3, 1, 2, 2), (_made("depthwise", A=(6, 3, 2, 2), B=(3, 2)),), x=(1, 3, 3, 4), **one),
        Case(
            "conv3d",
            (2, 2, 2, 1, 2),
            (_made("conv3d", A=(2, 4, 2, 1, 2), B=(2, 1), regrouped=True),),
            x=(1, 4, 3, 2, 3),
            **one,
        ),
        Case("in_out", updates=(_made("in_out", A=(2, 5), B=(3, 2)),), **IN_OUT),
        Case("bf16", updates=(_made("bf16", **wide),), dtype="BF16", **two),
    ]


def _made(seed: str, scaling: float | None = 0.5, *, A: tuple[int, ...], B: tuple[int, int], **flags: bool) -> Update:
    shapes = {"A": A, "B": B, "magnitude": (B[0],)}
    tensors = {field: numbers(f"grouped_dora.{seed}.{field}", *shape) for field, shape in shapes.items()}
    return Update("grouped_dora", tensors, ({} if scaling is None else {"scaling": scaling}) | flags)
