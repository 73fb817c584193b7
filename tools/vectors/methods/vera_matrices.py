"""VeRA with matrices: W' = W + scaling * E B D A."""

from __future__ import annotations

import numpy as np
from building import BIASED, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update, update
from container import numbers
from layers import Array


def formula(W: Array, b: Array | None, A: Array, B: Array, D: Array, E: Array, scaling: float = 1.0) -> Pair:
    """The four matrices, one after the other."""
    return W + scaling * np.einsum("op,pr,rs,si->oi", E, B, D, A), b


def cases() -> list[Case]:
    """Layouts, experts, slices, and A and B that two weights share."""
    shared = {"A": numbers("vera_matrices.A", 2, 5), "B": numbers("vera_matrices.B", 3, 2)}
    return [
        Case("linear", updates=(_update("linear"),), **BIASED),
        Case("scaled", updates=(_update("scaled", scaling=0.5),), **LINEAR),
        Case("in_out", updates=(_update("in_out", scaling=-2.0),), **IN_OUT),
        Case("fused", updates=(_update("fused"),), **FUSED),
        Case("experts", updates=(_update("experts", 2),), **EXPERTS),
        Case("shared_one", updates=(_update("shared.1", **shared),), **LINEAR),
        Case("shared_two", updates=(_update("shared.2", **shared),), **LINEAR),
    ]


def _update(seed: str, *e: int, scaling: float | None = None, **given: Array) -> Update:
    shapes = {"A": (2, 5), "B": (3, 2), "D": (2, 2), "E": (3, 3)}
    made = update("vera_matrices", f"vera_matrices.{seed}", scaling, **{f: (*e, *s) for f, s in shapes.items()})
    return Update(made.method, made.tensors | given, made.attributes)
