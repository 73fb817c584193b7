"""OFT: blocks of inputs or outputs turned by Cayley transforms, or by the first terms of their series."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from building import BIASED, CONV1D, CONV2D, EMBEDDING, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update
from container import numbers
from exact import block_diagonal, exact, eye, floats, inverse
from layers import Array


def formula(
    W: Array,
    b: Array | None,
    pairs: Array | None = None,
    square: Array | None = None,
    rescale: Array | None = None,
    side: str = "in",
    terms: int = 0,
    doubled: bool = False,
    coft: bool = False,
    eps: float = 6e-5,
    constraint: float = 0.0,
    on_output: bool = False,
) -> Pair:
    """W' = W @ blockdiag(R)^T, or rescale * blockdiag(R)^T @ W; on outputs b' may be rescale * blockdiag(R)^T @ b."""
    skews = [_skew(row) for row in pairs] if square is None else [block.T - block for block in square]  # type: ignore[union-attr]
    if coft:
        skews = [_limited([Q], eps / math.sqrt(len(skews)), 0.0)[0] for Q in skews]
    if constraint > 0:
        skews = _limited(skews, constraint, 1e-8)
    rotations = [_series(exact(Q), terms, doubled) if terms else _cayley(exact(Q)) for Q in skews]
    flat = exact(W.reshape(len(W), -1))
    width = flat.shape[0 if side == "out" else 1]
    if len(rotations) == 1:
        rotations = rotations * (width // len(rotations[0]))
    R = block_diagonal(rotations)
    turned = R.T @ flat if side == "out" else flat @ R.T
    new = floats(turned).reshape(W.shape)
    if on_output and b is not None:
        b = floats(R.T @ exact(b)) * (1 if rescale is None else rescale)
    return new if rescale is None else new * rescale.reshape(-1, *[1] * (W.ndim - 1)), b


def _skew(above: Array) -> Array:
    size = round((1 + math.sqrt(1 + 8 * len(above))) / 2)
    Q, values = np.zeros((size, size)), iter(above)
    for i in range(size):
        for j in range(i + 1, size):
            Q[i, j] = next(values)
            Q[j, i] = -Q[i, j]
    return Q


def _limited(skews: list[Array], most: float, more: float) -> list[Array]:
    norm = math.sqrt(math.fsum(float(v) ** 2 for Q in skews for v in Q.reshape(-1))) + more
    return skews if norm <= most else [Q * most / norm for Q in skews]


def _cayley(Q: Array) -> Array:
    return (eye(len(Q)) - Q) @ inverse(eye(len(Q)) + Q)


def _series(Q: Array, terms: int, doubled: bool) -> Array:
    if doubled:
        R = power = eye(len(Q))
        for _ in range(terms - 1):
            power = power @ Q
            R = R + power + power
        return R
    powers = [eye(len(Q)), Q]
    while len(powers) < terms or (terms == 3 and len(powers) < 4):
        powers.append(powers[-1] @ Q)
    if terms < 3:
        return powers[0] if terms == 1 else powers[0] + 2 * Q
    return powers[0] + 2 * sum(powers[1:-1]) + powers[-1]


def cases() -> list[Case]:
    """Both sides, both ways to store Q, both formulas of R, both limits on Q, one block for all, every layer."""
    six: dict[str, Any] = {"weight": (3, 6), "x": (2, 6)}
    embedding4 = EMBEDDING | {"weight": (6, 4)}
    return [
        Case("linear", updates=(_pairs("oft.linear", 3, 2),), bias=(3,), **six),
        Case("whole", updates=(_pairs("oft.whole", 1, 5),), **BIASED),
        Case("blocks_of_one", updates=(_pairs("oft.ones", 5, 1),), **LINEAR),
        Case("shared", updates=(_pairs("oft.shared", 1, 2),), **six),
        *(Case(f"terms{n}", updates=(_pairs(f"oft.terms{n}", 2, 3, terms=n),), **six) for n in range(1, 7)),
        *(Case(f"doubled{n}", updates=(_pairs(f"oft.d{n}", 2, 3, terms=n, doubled=True),), **six) for n in (1, 3, 5)),
        Case("coft", updates=(_pairs("oft.coft", 2, 3, coft=True, eps=0.5),), **six),
        Case("coft_default", updates=(_pairs("oft.coftd", 2, 3, coft=True, terms=5),), **six),
        Case("coft_within", updates=(_pairs("oft.within", 2, 3, coft=True, eps=64.0),), **six),
        Case("conv1d", updates=(_pairs("oft.conv1d", 2, 3),), **CONV1D),
        Case("conv2d", updates=(_pairs("oft.conv2d", 3, 4),), **CONV2D),
        Case("embedding", updates=(_pairs("oft.embedding", 1, 3, side="out"),), **EMBEDDING),
        Case("embedding_blocks", updates=(_pairs("oft.embblocks", 2, 2, side="out", terms=5),), **embedding4),
        Case("square", updates=(_square("oft.square", 1, 3, side="out"),), **BIASED),
        Case("rescaled", updates=(_square("oft.rescaled", 2, 2, rescale=4, side="out"),), weight=(4, 5), bias=(4,)),
        Case("rescaled_conv", updates=(_square("oft.resconv", 1, 3, rescale=3, side="out"),), **CONV2D),
        Case("on_output", updates=(_square("oft.onout", 1, 3, 3, side="out", on_output=True),), **BIASED),
        Case("on_output_conv", updates=(_square("oft.onconv", 1, 3, side="out", on_output=True),), **CONV2D),
        Case("constrained", updates=(_square("oft.constr", 2, 2, side="out", constraint=0.75),), weight=(4, 5)),
        Case("within", updates=(_square("oft.constr2", 2, 2, side="out", constraint=99.0),), weight=(4, 5)),
        Case("square_inputs", updates=(_square("oft.sqin", 1, 5),), **LINEAR),
        Case("in_out", updates=(_pairs("oft.in_out", 1, 5),), **IN_OUT),
        Case("experts", updates=(_pairs("oft.experts", 1, 5, e=(2,)),), **EXPERTS),
        Case("fused", updates=(_pairs("oft.fused", 1, 5),), **FUSED),
        Case("bf16", updates=(_pairs("oft.bf16", 1, 5),), dtype="BF16", **LINEAR),
    ]  # fmt: skip


def _pairs(seed: str, n: int, size: int, e: tuple[int, ...] = (), **attributes: Any) -> Update:
    return Update("oft", {"pairs": numbers(f"{seed}.pairs", *e, n, size * (size - 1) // 2)}, attributes)


def _square(seed: str, n: int, size: int, rescale: int = 0, **attributes: Any) -> Update:
    scales = {"rescale": numbers(f"{seed}.rescale", rescale, positive=True)} if rescale else {}
    return Update("oft", {"square": numbers(f"{seed}.square", n, size, size), **scales}, attributes)
