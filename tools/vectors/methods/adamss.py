"""AdaMSS: groups of rows, each with a pair of its own over one basis."""

from __future__ import annotations

from typing import Any

import numpy as np
from building import BIASED, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update
from container import numbers
from layers import Array


def formula(
    W: Array,
    b: Array | None,
    A: Array,
    B: Array,
    basis: Array,
    group: Array,
    ranks: Array,
    basis_bias: Array | None = None,
    seed: int = 0,  # noqa: ARG001 - of no effect
) -> Pair:
    """Row by row."""
    W, b = W.copy(), None if b is None else b.copy()
    for o, g in enumerate(group):
        for k in range(int(ranks[g])):
            row = sum(A[g, k, j] * basis[j] for j in range(len(basis)))
            W[o] += B[o, k] * row
            if basis_bias is not None and b is not None:
                b[o] += B[o, k] * sum(A[g, k, j] * basis_bias[j] for j in range(len(basis)))
    return W, b


def cases() -> list[Case]:
    """With the bias and without, groups of several ranks, one group, every layer."""
    return [
        Case("linear", updates=(_made("linear", [0, 1, 0], [2, 1], bias=True),), **BIASED),
        Case("weight_alone", updates=(_made("alone", [1, 1, 0], [1, 2], seed=7),), **LINEAR),
        Case("one_group", updates=(_made("one", [0, 0, 0], [2]),), **LINEAR),
        Case("in_out", updates=(_made("in_out", [2, 0, 1], [1, 1, 1]),), **IN_OUT),
        Case("experts", updates=(_stack("experts", [[0, 1, 0], [1, 0, 0]], [[2, 1], [1, 2]]),), **EXPERTS),
        Case("fused", updates=(_made("fused", [0, 1, 0], [2, 1], bias=True),), **FUSED),
        Case("bf16", updates=(_made("bf16", [0, 1, 0], [2, 1]),), dtype="BF16", **LINEAR),
    ]


def _made(name: str, group: list[int], ranks: list[int], bias: bool = False, **attributes: Any) -> Update:
    """Numbers behind the ranks are 0."""
    A, B = numbers(f"adamss.{name}.A", len(ranks), max(ranks), 2), numbers(f"adamss.{name}.B", len(group), max(ranks))
    for g, rank in enumerate(ranks):
        A[g, rank:] = 0
    for o, g in enumerate(group):
        B[o, ranks[g] :] = 0
    tensors = {"A": A, "B": B, "basis": numbers(f"adamss.{name}.basis", 2, 5)}
    tensors |= {"basis_bias": numbers(f"adamss.{name}.basis_bias", 2)} if bias else {}
    whole = {"group": np.array(group, np.int64), "ranks": np.array(ranks, np.int64)}
    return Update("adamss", tensors | whole, attributes)


def _stack(name: str, groups: list[list[int]], ranks: list[list[int]]) -> Update:
    each = [_made(f"{name}{e}", *pair) for e, pair in enumerate(zip(groups, ranks, strict=True))]
    return Update("adamss", {field: np.stack([one.tensors[field] for one in each]) for field in each[0].tensors})
