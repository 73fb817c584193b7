"""PiSSA: W' = W off the subspace of its largest singular values + scaling * B A."""

from __future__ import annotations

import numpy as np
from building import BIASED, EMBEDDING, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, low_rank
from layers import Array

from methods import kasa


def formula(W: Array, b: Array | None, A: Array, B: Array, scaling: float = 1.0) -> Pair:
    """What is off the subspace is W less its part on it."""
    return W - kasa.cut(W, len(A)) + scaling * np.einsum("or,ri->oi", B, A), b


def cases() -> list[Case]:
    """Wide and tall weights, every layout."""
    return cases_of("pissa")


def cases_of(method: str) -> list[Case]:
    """Cases of a method with A, B and a scaling, on weights without a kernel."""
    tall = {"weight": (6, 4), "x": (2, 4)}
    return [
        Case("linear", updates=(low_rank(method, f"{method}.linear", 3, 5),), **BIASED),
        Case("default_scaling", updates=(low_rank(method, f"{method}.default", 3, 5, scaling=None),), **LINEAR),
        Case("rank1", updates=(low_rank(method, f"{method}.rank1", 3, 5, r=1),), **LINEAR),
        Case("full_rank", updates=(low_rank(method, f"{method}.full", 3, 5, r=3),), **LINEAR),
        Case("tall", updates=(low_rank(method, f"{method}.tall", 6, 4),), **tall),
        Case("in_out", updates=(low_rank(method, f"{method}.in_out", 3, 5),), **IN_OUT),
        Case("embedding", updates=(low_rank(method, f"{method}.embedding", 3, 6),), **EMBEDDING),
        Case("experts", updates=(low_rank(method, f"{method}.experts", 3, 5, e=2),), **EXPERTS),
        Case("fused", updates=(low_rank(method, f"{method}.fused", 3, 5),), **FUSED),
        Case("bf16", updates=(low_rank(method, f"{method}.bf16", 3, 5),), dtype="BF16", **LINEAR),
    ]
