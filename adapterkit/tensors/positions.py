"""Positions in a weight: numbers put at them, random ones out of a seed, whether they are inside; numpy and torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .lazy import as_lazy
from .namespace import namespace

if TYPE_CHECKING:
    import torch

    from .lazy import Leaf


def scattered(values: Any, flat: Any, shape: tuple[int, ...]) -> Any:
    """A dense array of `shape`, zero but for the sums of `values` at the positions `flat` in C order."""
    size = 1
    for axis in shape:
        size *= axis
    if hasattr(values, "index_add"):
        return values.new_zeros(size).index_add(0, flat.reshape(-1).long(), values.reshape(-1)).reshape(shape)
    import numpy as np

    dense = np.bincount(flat.reshape(-1).astype("int64"), values.reshape(-1), minlength=size)
    return dense.astype(values.dtype, copy=False).reshape(shape)


def add_at(D: Any, rows: Any, columns: Any, values: Any) -> None:
    """D[rows, columns] += values, in place; D may be a transposed view, and a position may come twice."""
    if hasattr(D, "index_put_"):
        D.index_put_((rows.long(), columns.long()), values.to(D.dtype), accumulate=True)
        return
    import numpy as np

    np.add.at(D, (rows, columns), values)


def counting(count: int, like: Any) -> Any:
    """The numbers from 0 to `count` - 1, where another array lies."""
    return namespace(like).arange(count, device=getattr(like, "device", None))


def random_positions(seed: int, size: int, count: int) -> torch.Tensor:
    """The first `count` of the numbers below `size` in random order, as torch's generator on the CPU draws it."""
    import torch

    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]


def outside(leaf: Leaf, below: tuple[int | None, ...]) -> int | None:
    """The first number below 0, or not below its bound: one for all, or one for each row of pairs; None without one."""
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
