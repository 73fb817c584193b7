"""OLoRA: W' = W - scaling * Q' R' + scaling * B A, Q' R' the part of W along its first r columns."""

from __future__ import annotations

import numpy as np
from building import Case, Pair
from layers import Array

from methods import pissa


def formula(W: Array, b: Array | None, A: Array, B: Array, scaling: float = 1.0) -> Pair:
    """Gram and Schmidt: one direction a column, each taking its part of every later column."""
    left, taken = W.copy(), np.zeros_like(W)
    for j in range(len(A)):
        q = left[:, j] / np.sqrt((left[:, j] ** 2).sum())
        part = np.outer(q, q @ left)
        part[:, :j] = 0
        left, taken = left - part, taken + part
    return W + scaling * (np.einsum("or,ri->oi", B, A) - taken), b


def cases() -> list[Case]:
    """As PiSSA's."""
    return pissa.cases_of("olora")
