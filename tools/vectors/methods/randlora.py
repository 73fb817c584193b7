"""RandLoRA: W' = W + scaling * the sum of n products of shared bases, scaled per row and per column."""

from __future__ import annotations

from building import BIASED, EMBEDDING, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update, update
from container import numbers
from layers import Array


def formula(W: Array, b: Array | None, B: Array, lam: Array, A: Array, gamma: Array, scaling: float = 1.0) -> Pair:
    """Term by term: number q is base q // r of B's column q % r, and row q // n of A with gamma q % n."""
    r, n = lam.shape
    longer, shorter = max(W.shape), min(W.shape)
    change = W * 0
    for q in range(r * n):
        column = B[:longer, q // r, q % r]
        row = lam[q // n, q % n] * A[q // n, 0, :shorter] * gamma[q % n]
        term = column[:, None] * row[None, :]
        change += term.T if W.shape[1] > W.shape[0] else term
    return W + scaling * change, b


def cases() -> list[Case]:
    """Wide, tall and square weights that share bases, and every layout."""
    A, B = numbers("randlora.A", 2, 1, 5), numbers("randlora.B", 8, 3, 2)
    fit = numbers("randlora.fit.A", 2, 1, 3), numbers("randlora.fit.B", 5, 2, 2)
    stack = numbers("randlora.stack.A", 2, 2, 1, 4), numbers("randlora.stack.B", 2, 6, 2, 2)
    return [
        Case("linear", updates=(_made("linear", 3, A, B, 2),), **BIASED),
        Case("tall", updates=(_made("tall", 4, A, B, 2),), weight=(7, 4), x=(2, 4)),
        Case("square", updates=(_made("square", 5, A, B, 3),), weight=(5, 5), x=(2, 5)),
        Case("default", updates=(_made("default", 3, A, B, 2, scaling=None),), **LINEAR),
        Case("one_base", updates=(_made("one_base", 3, A, B, 1),), **LINEAR),
        Case("in_out", updates=(_made("in_out", 3, A, B, 2),), **IN_OUT),
        Case("embedding", updates=(_made("embedding", 3, A, B, 2),), **EMBEDDING),
        Case("experts", updates=(_made("experts", 3, *stack, 2, e=(2,)),), **EXPERTS),
        Case("fused", updates=(_made("fused", 3, A, B, 2),), **FUSED),
        Case("bf16", updates=(_made("bf16", 3, *fit, 2),), dtype="BF16", **LINEAR),
    ]


def _made(
    seed: str, short: int, A: Array, B: Array, n: int, scaling: float | None = 0.5, e: tuple[int, ...] = ()
) -> Update:
    own = update("randlora", f"randlora.{seed}", scaling, lam=(*e, B.shape[-1], n), gamma=(*e, n, short))
    return Update("randlora", own.tensors | {"A": A, "B": B}, own.attributes)
