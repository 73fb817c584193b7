"""Subtract tensors of two models in a dtype wide enough for small changes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import AdapterkitError, Malformed, ShapeMismatch
from ..io.lazy import Lazy, Span, check_finite, read_span

if TYPE_CHECKING:
    from ..core.adapter import Target
    from ..io.computed import Array

PIECE = 64 << 20
"""The number of bytes of a table that are compared in one step."""

CACHED = 1 << 15
"""The number of values that are summed in one step. This many float64 values fit in a processor core's cache."""


def difference(name: str, tuned: Lazy, base: Lazy, *, exact: bool) -> Array:
    """Return `tuned - base` in float32, or in float64 if the dtype of one tensor has more than 32 bits.

    For 16-bit weights, the difference in float32 is almost always exact.

    Args:
        name: the name of the weight, for messages.
        tuned: the weight of the tuned model.
        base: the weight of the base, with the same shape.
        exact: whether to also use float64 if float32 would round an element of the difference.

    Raises:
        Malformed: one of the two tensors contains a NaN or an infinity.
    """
    import numpy as np

    one, other = floats_of(tuned), floats_of(base)
    # With `exact`, keep the tuned weight, because the check for rounding below needs it. Otherwise, overwrite the
    # weight with the difference, to save memory.
    D: Array = one - other if exact or one.dtype != other.dtype else np.subtract(one, other, out=one)
    if not math.isfinite(frobenius(D)):
        for tensor in (tuned, base):
            check_finite(tensor, name)
    # Dekker 1971: subtracting the rounded difference D from the larger operand is exact. So D was not rounded if this
    # subtraction returns the smaller operand. Check both operands, because either may be the larger one.
    if not exact or D.dtype == np.float64 or bool((one - D == other).all() and (other + D == one).all()):
        return D
    wide: Array = one.astype(np.float64) - other
    return wide


def left(D: Array, B: Array, A: Array) -> float:
    """Return the Frobenius norm of `D - B @ A`, computed in blocks of rows."""
    step = max(1, 8 * CACHED // max(D.shape[1], 1))
    B, A = B.astype(D.dtype), A.astype(D.dtype)
    return math.hypot(*(frobenius(D[i : i + step] - B[i : i + step] @ A) for i in range(0, len(D), step)))


def frobenius(D: Array) -> float:
    """Return the Frobenius norm of an array of any shape, summed in float64; infinity if a square overflows."""
    import numpy as np

    flat = D.reshape(-1)
    parts = (flat[i : i + CACHED].astype(np.float64, copy=False) for i in range(0, flat.size, CACHED))
    with np.errstate(over="ignore", invalid="ignore"):
        return math.sqrt(math.fsum(float(part @ part) for part in parts))


def too_large() -> Malformed:
    """Return the error for a change whose norm overflows."""
    why = "the values of the change are too large for float64"
    return Malformed(why, cure="Use an earlier checkpoint: the training diverged, or the file is damaged")


def check_rows(name: str, tuned: Lazy, base: Lazy) -> int:
    """Return the number of rows of the base's table; the tuned table may have more rows.

    Raises:
        ShapeMismatch: the shapes differ. The only allowed difference is additional rows in a tuned table with two axes.
    """
    grown = len(tuned.shape) == len(base.shape) == 2 and tuned.shape[1] == base.shape[1]
    if tuned.shape != base.shape and (not grown or tuned.shape[0] < base.shape[0]):
        why = f"the shape is {list(tuned.shape)} in the tuned model, but {list(base.shape)} in the base"
        raise ShapeMismatch(why, where=name, cure="Pass the base that the model was tuned from")
    return base.shape[0]


def changed_rows(name: str, tuned: Lazy, base: Lazy) -> tuple[list[int], float]:
    """Return the indices of the base's rows that changed, and the squared Frobenius norm of the change of these rows.

    Raises:
        Malformed: one of the two tables contains a NaN or an infinity.
    """
    import numpy as np

    width = tuned.shape[1]
    step = max(1, PIECE // max(8 * width, 1))
    index: list[int] = []
    square = 0.0
    for start in range(0, tuned.shape[0], step):
        now, was = (_piece(tensor, start, start + step) for tensor in (tuned, base))
        change = now.copy()
        change[: len(was)] -= was
        square += frobenius(change[: len(was)]) ** 2
        if not math.isfinite(frobenius(change)):
            for tensor in (tuned, base):
                check_finite(tensor, name)
        index += (start + np.flatnonzero((change[: len(was)] != 0).any(1))).tolist()
    return index, square


def _piece(tensor: Lazy, start: int, stop: int) -> Array:
    """Return some rows of a table in float64; read only these rows if the table is contiguous in its file."""
    import numpy as np

    rows, width = tensor.shape
    start, stop = min(start, rows), min(stop, rows)
    size = width * tensor.dtype.itemsize
    if tensor.span is None:
        part: Any = tensor.numpy()[start:stop].view(tensor.dtype.array)
    else:
        span = Span(tensor.span.path, tensor.span.offset + start * size, (stop - start) * size)
        part = np.frombuffer(read_span(span), tensor.dtype.array).reshape(stop - start, width)
    wide: Array = part.astype(np.float64)
    return wide


def floats_of(tensor: Lazy) -> Array:
    """Return the values of a tensor in float64 if its dtype is wider than 32 bits, else in float32."""
    import numpy as np

    values = tensor.numpy()
    if tensor.dtype.name == "BF16":
        # Shift the bits of bf16 by 16, because bf16 is the upper half of a float32.
        wide: Array = np.left_shift(values, 16, dtype=np.uint32).view(np.float32)
        return wide
    return values.view(tensor.dtype.array).astype(np.float64 if tensor.dtype.itemsize > 4 else np.float32)


@contextmanager
def errors_at(target: Target) -> Iterator[None]:
    """Add the target's name to errors from a `with` block, and replace LAPACK's errors with `Malformed`."""
    import numpy as np

    try:
        # Ignore overflows here, because storing or decomposing a result raises an error if its values are too large.
        with np.errstate(over="ignore", invalid="ignore"):
            yield
    except np.linalg.LinAlgError:
        raise too_large().at(where=str(target)) from None
    except AdapterkitError as error:
        raise error.at(where=str(target)) from None
