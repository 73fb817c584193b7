"""Scatter values to positions in a weight, draw random positions, and check positions, for numpy and torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from ..io.lazy import as_lazy
from .namespace import N, namespace

if TYPE_CHECKING:
    import torch

    from ..io.lazy import Array, Leaf


def scattered(values: N, flat: N, shape: tuple[int, ...]) -> N:
    """Return an array of `shape` with `values` at the flat C-order positions `flat`, and zeros elsewhere.

    Positions may repeat; values at the same position are added.
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
    """Return `count` distinct random integers from 0 to `size - 1`, drawn by torch's CPU generator with `seed`."""
    # Use a slice of `randperm`, as PEFT does for SHiRA. Another sampler would give other positions than in training.
    import torch

    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]


def outside(leaf: Leaf, below: tuple[int | None, ...]) -> int | None:
    """Return the first position that is negative or not below its bound; None if there is none.

    Args:
        leaf: the positions, as integers.
        below: one bound for all positions, or one bound for each index of the second-to-last axis. A bound of None
            allows all positions that are not negative.
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
