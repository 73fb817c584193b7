"""BOFT as LyCORIS has it: W' = rescale * M_m' ... M_0 W, with Cayley transforms of blocks of paired outputs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from building import CONV2D, IN_OUT, Case, Pair, Update
from container import numbers
from exact import block_diagonal, exact, eye, floats, inverse
from layers import Array, convolution, embedding, experts


def formula(
    W: Array,
    b: Array | None,
    square: Array,
    rescale: Array | None = None,
    constraint: float = 0.0,
    on_output: bool = False,
) -> Pair:
    """Every factor as a whole matrix, permutations as matrices too."""
    flat, size = exact(W.reshape(len(W), -1)), square.shape[-1]
    beside = None if b is None else exact(b)
    skews = [[block.T - block for block in factor] for factor in square]
    norm = math.sqrt(math.fsum(float(v) ** 2 for factor in skews for Q in factor for v in Q.reshape(-1))) + 1e-8
    shrink = constraint / norm if 0 < constraint < norm else 1.0
    for i, factor in enumerate(skews):
        Qs = [exact(Q * shrink) for Q in factor]
        C = block_diagonal([(eye(size) - Q) @ inverse(eye(size) + Q) for Q in Qs])
        P = _permutation(len(W), size // 2 * 2**i)
        flat = P.T @ C @ P @ flat
        beside = None if beside is None else P.T @ C @ P @ beside
    new = floats(flat).reshape(W.shape)
    if on_output and beside is not None:
        b = floats(beside) * (1 if rescale is None else rescale)
    return new if rescale is None else new * rescale.reshape(-1, *[1] * (W.ndim - 1)), b


def _permutation(width: int, apart: int) -> Array:
    """Rows of the identity: of every run of 2 * apart the two halves, interleaved."""
    return eye(width)[np.arange(width).reshape(-1, 2, apart).swapaxes(1, 2).reshape(-1)]


def cases() -> list[Case]:
    """One to three factors, a constraint, a factor on outputs, every layer."""
    eight: dict[str, Any] = {"weight": (8, 3), "x": (2, 3)}
    return [
        Case("linear", updates=(_boft("linear", 1, 2, 2),), weight=(4, 5), bias=(4,)),
        Case("one_block", updates=(_boft("one", 1, 1, 4),), weight=(4, 5)),
        Case("two", updates=(_boft("two", 2, 2, 4),), **eight),
        Case("three", updates=(_boft("three", 3, 4, 2),), **eight),
        Case("constrained", updates=(_boft("constr", 2, 2, 4, constraint=0.75),), **eight),
        Case("within", updates=(_boft("within", 2, 2, 4, constraint=99.0),), **eight),
        Case("rescaled", updates=(_boft("rescaled", 2, 2, 2, rescale=4),), weight=(4, 5), bias=(4,)),
        Case(
            "conv2d", updates=(_boft("conv2d", 2, 2, 2, rescale=4),), **CONV2D | {"weight": (4, 2, 2, 3), "bias": (4,)}
        ),
        Case(
            "on_output",
            updates=(_boft("on_output", 2, 2, 2, rescale=4, on_output=True),),
            **CONV2D | {"weight": (4, 2, 2, 3), "bias": (4,)},
        ),
        Case("in_out", updates=(_boft("in_out", 2, 2, 2),), **IN_OUT | {"weight": (5, 4), "bias": (4,)}),
        Case("embedding", updates=(_boft("emb", 1, 2, 2),), weight=(6, 4), layout="in out *k", x=None, layer=embedding),
        Case("experts", updates=(_stack,), weight=(2, 4, 5), layout="e out *in", x=(2, 2, 5), layer=experts),
        Case("fused", updates=(_boft("fused", 1, 2, 2),), weight=(12, 5), bias=(12,), rows=(4, 8)),
        Case("conv1d", updates=(_boft("conv1d", 1, 2, 2),), weight=(4, 2, 3), x=(1, 2, 5), layer=convolution),
        Case("bf16", updates=(_boft("bf16", 1, 2, 2),), weight=(4, 5), dtype="BF16"),
    ]


def _boft(seed: str, factors: int, blocks: int, size: int, rescale: int = 0, **attributes: Any) -> Update:
    scales = {"rescale": numbers(f"boftout.{seed}.rescale", rescale, positive=True)} if rescale else {}
    square = numbers(f"boftout.{seed}.square", factors, blocks, size, size)
    return Update("boft_outputs", {"square": square, **scales}, attributes)


_stack = Update("boft_outputs", {"square": numbers("boftout.experts.square", 2, 1, 2, 2, 2)})
