"""How far outputs are apart, and how far rounding alone may bring them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

TOLERANCE = {"f": 1e-5, "V": 3e-2}
"""The largest difference, as a share of the largest output, for float32 and float64, and for narrower outputs."""

NOISE, MOST_NOISE = 10.0, 1e-4
"""Deep graphs round more: a difference may be this many times that of the graph from itself, run without
optimizations, and a share of this much at most."""


def difference_of(got: Sequence[Any], wanted: Sequence[Any]) -> float:
    """The largest difference as a share of the largest number of its output."""
    worst = 0.0
    for one, other in zip(got, wanted, strict=True):
        a, b = (np.asarray(array) for array in (one, other))
        if a.dtype.kind not in "fV":
            continue
        a, b = a.astype(np.float64), b.astype(np.float64)
        there = np.isfinite(b)
        if a.shape != b.shape or not np.array_equal(np.isfinite(a), there):
            return float("inf")
        if not np.array_equal(a[~there], b[~there], equal_nan=True):
            return float("inf")
        if there.any():
            worst = max(worst, float(abs(a[there] - b[there]).max() / max(abs(b[there]).max(), 1e-30)))
    return worst


def is_narrow(outputs: Sequence[Any]) -> bool:
    """Whether some of the outputs have 16 bits or fewer."""
    arrays = map(np.asarray, outputs)
    return any(array.dtype.kind in "fV" and array.dtype.itemsize < 4 for array in arrays)


def most_of_oracles(outputs: Sequence[Any]) -> float:
    """The largest difference of onnxruntime and ONNX's reference implementation that rounding explains."""
    return TOLERANCE["V"] if is_narrow(outputs) else MOST_NOISE
