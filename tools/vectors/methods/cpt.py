"""CPT: E plus D, each row of D no longer than its epsilon."""

from __future__ import annotations

import numpy as np
from building import Case, contextual
from container import numbers
from layers import Array


def context(E: Array, D: Array, epsilon: Array) -> dict[str, Array]:
    """A row that is too long is shortened to its bound."""
    rows = []
    for token, change, bound in zip(E, D, epsilon, strict=True):
        length = float(np.sqrt((change**2).sum()))
        rows.append(token + (change * (bound / length) if length > bound else change))
    return {"embeddings": np.stack(rows)}


def cases() -> list[Case]:
    """Rows within their bounds, beyond them, and of nothing but zeros."""
    bounds, zeros = np.array([1e-10, 0.5, 100.0]), numbers("cpt.zeros.D", 2, 4) * np.array([[0.0], [1.0]])
    return [
        contextual("cpt", "", E=(3, 4), D=(3, 4), epsilon=bounds),
        contextual("cpt", "zeros", E=(2, 4), D=zeros, epsilon=np.array([0.1, 0.1])),
    ]
