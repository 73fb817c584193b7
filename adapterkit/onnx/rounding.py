"""Measure differences of outputs, and bound those that rounding alone can cause."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

TOLERANCE = {"f": 1e-5, "V": 3e-2}
"""Largest allowed difference relative to the largest output: for float32 and float64 ("f"), and for 16 bits ("V")."""

NOISE, MOST_NOISE = 10.0, 1e-4
"""Deep graphs round more. A difference may be this many times the graph's difference from itself without
optimizations, but never more than the second number."""


def difference_of(got: Sequence[Any], wanted: Sequence[Any]) -> float:
    """Return the largest difference, relative to the largest number of its output."""
    worst = 0.0
    for one, other in zip(got, wanted, strict=True):
        a, b = (np.asarray(array) for array in (one, other))
        # numpy gives bfloat16 and float8 of ml_dtypes the kind V.
        if a.dtype.kind not in "fV":
            continue
        a, b = a.astype(np.float64), b.astype(np.float64)
        there = np.isfinite(b)
        # NaNs and infinities must be in the same places; otherwise no number measures the difference.
        if a.shape != b.shape or not np.array_equal(np.isfinite(a), there):
            return float("inf")
        if not np.array_equal(a[~there], b[~there], equal_nan=True):
            return float("inf")
        if there.any():
            worst = max(worst, float(abs(a[there] - b[there]).max() / max(abs(b[there]).max(), 1e-30)))
    return worst


def is_narrow(outputs: Sequence[Any]) -> bool:
    """Whether some outputs have 16 bits or fewer."""
    arrays = map(np.asarray, outputs)
    return any(array.dtype.kind in "fV" and array.dtype.itemsize < 4 for array in arrays)


def most_of_oracles(outputs: Sequence[Any]) -> float:
    """Return the largest difference between onnxruntime and the reference implementation that rounding explains."""
    return TOLERANCE["V"] if is_narrow(outputs) else MOST_NOISE
