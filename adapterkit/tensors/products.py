"""Products of thin factors, for numpy and torch: D = B @ A into given memory, and the Tucker form of a kernel."""

from __future__ import annotations

from typing import Any

ROWS = 16
"""Rows computed at a time: OpenBLAS takes less time a number where the product stays in a core's cache."""


def product(D: Any, B: Any, A: Any) -> None:
    """D `[m, n]` = B `[m, r]` @ A `[r, n]`; D may be a transposed view."""
    if hasattr(D, "copy_"):
        D.copy_(B @ A)
    elif not D.flags.c_contiguous and D.T.flags.c_contiguous:
        _product(D.T, A.T, B.T)
    else:
        _product(D, B, A)


def tucker(core: Any, a: Any, inputs: Any) -> Any:
    """sum_ij core[i, j, *k] a[o, i] inputs[j, n] as `[out, in * k]`."""
    r = len(core)
    inner = (core.reshape(r, r, -1).swapaxes(1, 2) @ inputs).swapaxes(1, 2)
    return a @ inner.reshape(r, -1)


def _product(D: Any, B: Any, A: Any) -> None:
    from numpy import matmul

    m, n = D.shape
    if m % ROWS or not D.flags.c_contiguous:
        matmul(B, A, out=D)
    else:
        matmul(B.reshape(-1, ROWS, len(A)), A, out=D.reshape(-1, ROWS, n))
