"""PSOFT: W' = W + B (R - I) A, in a subspace that is given, or W's own of the largest singular values.

Singular vectors have no sign of their own, so where they are W's own, R is diagonal here: that makes no use of signs.
It is near the identity too, because tools know W's own singular vectors to float32 only.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from building import BIASED, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update
from container import numbers
from exact import exact, eye, floats, inverse, singular
from layers import Array


def formula(
    W: Array,
    b_: Array | None,
    pairs: Array | None = None,
    R: Array | None = None,
    a: Array | None = None,
    b: Array | None = None,
    A: Array | None = None,
    B: Array | None = None,
    symmetric: bool = False,
    steps: int = 0,
    seed: int = 0,
    terms: int = 0,
    eps: float = 0.0,
) -> Pair:
    """W' = W + B (diag(b) R diag(a) - I) A; a sketch of as many columns as W has finds its exact decomposition."""
    turned = exact(R) if pairs is None else _rotation(pairs, terms, eps)  # type: ignore[arg-type]
    assert not (steps or seed) or len(turned) == min(W.shape)
    rank = len(turned)
    turned = turned if b is None else exact(b)[:, None] * turned
    turned = turned if a is None else turned * exact(a)[None, :]
    if A is None or B is None:
        U, S, V = singular(W)
        left = [math.sqrt(s) for s in S[:rank]] if symmetric else S[:rank]
        right = [math.sqrt(s) for s in S[:rank]] if symmetric else [1.0] * rank
        A, B = np.array(right)[:, None] * V[:rank], U[:, :rank] * np.array(left)
    return floats(exact(W) + exact(B) @ (turned - eye(rank)) @ exact(A)), b_


def _rotation(pairs: Array, terms: int, eps: float) -> Array:
    rank = round((1 + math.sqrt(1 + 8 * len(pairs))) / 2)
    Q, values = np.zeros((rank, rank)), iter(pairs)
    for i in range(rank):
        for j in range(i + 1, rank):
            Q[i, j] = next(values)
            Q[j, i] = -Q[i, j]
    norm = math.sqrt(math.fsum(float(v) ** 2 for v in Q.reshape(-1)))
    Q = exact(Q * eps / norm if 0 < eps < norm else Q)
    if not terms:
        return (eye(rank) + Q) @ inverse(eye(rank) - Q)
    powers = [eye(rank), Q]
    while len(powers) < max(terms, 4 if terms == 3 else 2):
        powers.append(powers[-1] @ Q)
    if terms < 3:
        return powers[0] if terms == 1 else powers[0] + 2 * Q
    return powers[0] + 2 * sum(powers[1:-1]) + powers[-1]


def cases() -> list[Case]:
    """Rotations and free matrices, with scales and without, in a given subspace and in W's own."""
    both = {"a": (2,), "b": (2,)}
    return [
        Case("linear", updates=(_given("psoft.linear", 2, a=(2,), b=(2,)),), **BIASED),
        Case("bare", updates=(_given("psoft.bare", 3),), **LINEAR),
        Case("only_a", updates=(_given("psoft.only_a", 2, a=(2,)),), **LINEAR),
        Case("free", updates=(_given("psoft.free", 2, R=(2, 2), b=(2,)),), **LINEAR),
        *(Case(f"terms{n}", updates=(_given(f"psoft.terms{n}", 3, terms=n),), **LINEAR) for n in (1, 3, 5)),
        Case("limited", updates=(_given("psoft.limited", 3, terms=5, eps=0.875),), **LINEAR),
        Case("own", updates=(_own("psoft.own", 2, **both),), **BIASED),
        Case("own_symmetric", updates=(_own("psoft.ownsym", 3, symmetric=True, a=(3,)),), **LINEAR),
        # All singular values: a sketch of as many columns finds the same factors as the exact decomposition.
        Case("own_sketched", updates=(_own("psoft.sketched", 3, steps=3, seed=7, a=(3,)),), **LINEAR),
        Case("own_tall", updates=(_own("psoft.tall", 2, b=(2,), symmetric=False),), weight=(5, 3), x=(2, 3)),
        Case("in_out", updates=(_given("psoft.in_out", 2, **both),), **IN_OUT),
        Case("experts", updates=(_own("psoft.experts", 2, e=(2,), a=(2, 2)),), **EXPERTS),
        Case("fused", updates=(_given("psoft.fused", 2, **both),), **FUSED),
        Case("bf16", updates=(_given("psoft.bf16", 2, **both),), dtype="BF16", **LINEAR),
    ]


def _given(seed: str, rank: int, **others: Any) -> Update:
    shapes = {name: others.pop(name) for name in ("R", "a", "b") if name in others}
    shapes |= {"A": (rank, 5), "B": (3, rank)}
    shapes |= {} if "R" in shapes else {"pairs": (rank * (rank - 1) // 2,)}
    return Update("psoft", {name: numbers(f"{seed}.{name}", *shape) for name, shape in shapes.items()}, others)


def _own(name: str, rank: int, /, e: tuple[int, ...] = (), **others: Any) -> Update:
    shapes = {field: others.pop(field) for field in ("a", "b") if field in others}
    tensors = {field: 1 + 2.0**-23 * numbers(f"{name}.{field}", *shape) for field, shape in shapes.items()}
    return Update("psoft", {"pairs": np.zeros((*e, rank * (rank - 1) // 2)), **tensors}, others)
