"""Positions in a weight, for numpy and torch: scatter numbers, draw positions from a seed, check bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..io.lazy import as_lazy
from .namespace import namespace

if TYPE_CHECKING:
    import torch

    from ..io.lazy import Leaf


def scattered(values: Any, flat: Any, shape: tuple[int, ...]) -> Any:
    """Return zeros of `shape`, plus the sums of `values` at the flat C-order positions `flat`."""
    size = 1
    for axis in shape:
        size *= axis
    if hasattr(values, "index_add"):
        return values.new_zeros(size).index_add(0, flat.reshape(-1).long(), values.reshape(-1)).reshape(shape)
    import numpy as np

    dense = np.bincount(flat.reshape(-1).astype("int64"), values.reshape(-1), minlength=size)
    return dense.astype(values.dtype, copy=False).reshape(shape)


def add_at(D: Any, rows: Any, columns: Any, values: Any) -> None:
    """Compute D[rows, columns] += values in place; D may be a transposed view, and positions may repeat."""
    if hasattr(D, "index_put_"):
        D.index_put_((rows.long(), columns.long()), values.to(D.dtype), accumulate=True)
        return
    import numpy as np

    np.add.at(D, (rows, columns), values)


def counting(count: int, like: Any) -> Any:
    """Return the integers 0 to `count` - 1, on the device of another array."""
    return namespace(like).arange(count, device=getattr(like, "device", None))


def random_positions(seed: int, size: int, count: int) -> torch.Tensor:
    """Return `count` distinct random numbers below `size`, as torch's CPU generator draws them."""
    # Use a slice of `randperm`, like PEFT's SHiRA. Another way of sampling would put the trained values elsewhere.
    import torch

    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]


def outside(leaf: Leaf, below: tuple[int | None, ...]) -> int | None:
    """Return the first number that is negative or not below its bound; None if all are inside.

    Args:
        leaf: the numbers.
        below: one bound for all numbers, or one for each row of pairs; None means no bound.
    """
    tensor = as_lazy(leaf)
    if not tensor.nbytes:
        return None
    values = tensor.numpy()
    parts = [values] if len(below) == 1 else [values[..., row, :] for row in range(len(below))]
    for part, bound in zip(parts, below, strict=True):
        bad = part[(part < 0) | (part >= bound)] if bound is not None else part[part < 0]
        if bad.size:
            return int(bad.reshape(-1)[0])
    return None
