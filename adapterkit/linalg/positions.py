"""Positions in a weight, for numpy and torch: scatter numbers, draw positions from a seed, check bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from ..io.lazy import as_lazy
from .namespace import N, namespace

if TYPE_CHECKING:
    import torch

    from ..io.lazy import Array, Leaf


def scattered(values: N, flat: N, shape: tuple[int, ...]) -> N:
    """Return an array of `shape` with `values` at the flat C-order positions `flat`, and zeros elsewhere.

    Positions may repeat; the values at one position are added up.
    """
    size = 1
    for axis in shape:
        size *= axis
    if hasattr(values, "index_add"):
        numbers, where = cast("tuple[torch.Tensor, torch.Tensor]", (values, flat))
        total = numbers.new_zeros(size).index_add(0, where.reshape(-1).long(), numbers.reshape(-1))
        return cast(N, total.reshape(shape))
    import numpy as np

    array, at = cast("tuple[Array, Array]", (values, flat))
    dense = np.bincount(at.reshape(-1).astype("int64"), array.reshape(-1), minlength=size)
    return cast(N, dense.astype(array.dtype, copy=False).reshape(shape))


def add_at(D: N, rows: N, columns: N, values: N) -> None:
    """Compute D[rows, columns] += values in place; D may be a transposed view, and positions may repeat."""
    if hasattr(D, "index_put_"):
        out, row, column, added = cast("tuple[torch.Tensor, ...]", (D, rows, columns, values))
        out.index_put_((row.long(), column.long()), added.to(out.dtype), accumulate=True)
        return
    import numpy as np

    np.add.at(cast("Array", D), cast("tuple[Array, Array]", (rows, columns)), cast("Array", values))


def counting(count: int, like: N) -> N:
    """Return the integers 0 to `count - 1`, on the device of the array `like`."""
    return namespace(like).arange(count, device=getattr(like, "device", None))


def random_positions(seed: int, size: int, count: int) -> torch.Tensor:
    """Return `count` distinct random numbers below `size`, as torch's CPU generator draws them."""
    # Use a slice of `randperm`, as PEFT does for SHiRA. Another sampler would give other positions than in training.
    import torch

    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]


def outside(leaf: Leaf, below: tuple[int | None, ...]) -> int | None:
    """Return the first number that is negative or not below its bound; None if all numbers are within their bounds.

    Args:
        leaf: the numbers.
        below: one bound for all numbers, or one bound for each index of the second-last axis; a bound of None allows
            all numbers that are not negative.
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
