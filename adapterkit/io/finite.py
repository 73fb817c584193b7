"""Find NaNs and infinities by their bits, for any element type and without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import Malformed
from .lazy import as_lazy

if TYPE_CHECKING:
    import numpy as np

    from .dtypes import DType
    from .lazy import Leaf, Shape

_BITS = {
    "BF16": (0x7F80, 0x7F80),
    "F8_E5M2": (0x7C, 0x7C),
    "F8_E4M3": (0x7F, 0x7F),
    "F8_E8M0": (0xFF, 0xFF),
    "F8_E4M3FNUZ": (0xFF, 0x80),
    "F8_E5M2FNUZ": (0xFF, 0x80),
}
"""Types that numpy lacks -> (mask, value of the masked bits for a non-finite number).

F8_E4M3, F8_E8M0 and the FNUZ types have no infinity and one or two NaNs: https://arxiv.org/abs/2209.05433,
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""


def check_finite(leaf: Leaf, where: str | None = None, values: np.ndarray[Any, Any] | None = None) -> None:
    """Refuse a tensor that holds a NaN or an infinity.

    Args:
        leaf: the tensor; integer tensors pass.
        where: its name, for the message.
        values: its numbers in the storage dtype, if they are already read.

    Raises:
        Malformed: names the first position, and the file if the tensor is read from one.
    """
    tensor = as_lazy(leaf)
    # Without elements there is nothing to look at; numpy refuses [0, 2**62, 2**62], which a file may hold.
    if not tensor.dtype.floating or not tensor.nbytes:
        return
    position = first_in(tensor.numpy() if values is None else values, tensor.dtype)
    if position is not None:
        why = f"a NaN or an infinity at {list(position)}"
        cure = "The training diverged, or the file is damaged; use an earlier checkpoint"
        raise Malformed(why, path=tensor.file, where=where, cure=cure)


def first_not_finite(leaf: Leaf) -> Shape | None:
    """Return the position of the first NaN or infinity in C order; None if all values are finite."""
    tensor = as_lazy(leaf)
    return first_in(tensor.numpy(), tensor.dtype) if tensor.dtype.floating and tensor.nbytes else None


def first_in(values: np.ndarray[Any, Any], dtype: DType) -> Shape | None:
    """Like `first_not_finite`, for numbers that are already read, in the storage type of `dtype`."""
    bad = _not_finite(values, dtype)
    if not bad.any():
        return None
    import numpy as np

    return tuple(int(i) for i in np.unravel_index(int(bad.argmax()), values.shape))


def _not_finite(values: np.ndarray[Any, Any], dtype: DType) -> np.ndarray[Any, Any]:
    import numpy as np

    if dtype.name not in _BITS:
        return np.asarray(~np.isfinite(values))
    mask, bits = _BITS[dtype.name]
    return np.asarray((values & mask) == bits)
