"""Check integer fields that hold positions: each must be on its axis, and none may repeat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ...io.lazy import as_lazy
from ...linalg.positions import outside
from ..shapes import Axes

if TYPE_CHECKING:
    from .update import Update


def misplaced(update: Update, sizes: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the fields with a position that is not on its axis, and what is wrong.

    Args:
        update: its fields declare in `below` the axes, or products of axes, of their positions.
        sizes: sizes of axes that the tensors do not show.
    """
    fields = update.tensor_fields()
    placed = {name: leaf for name, leaf in update.tensors.items() if fields[name].metadata["below"]}
    stack = any(len(leaf.shape) > len(fields[name].metadata["axes"].axes) for name, leaf in placed.items())
    known = {**update.dims(stack), **sizes} if placed else {}
    for name, leaf in placed.items():
        axes = fields[name].metadata["below"]
        bounds = tuple(_size(axis, known) for axis in axes)
        worst = outside(leaf, bounds)
        if worst is not None:
            said = (axis if size is None else f"{axis}={size}" for axis, size in zip(axes, bounds, strict=True))
            yield name, f"position {worst} is not on {' and '.join(said)}"


def repeated(update: Update) -> str:
    """Return the first field with a repeated position or pair of positions that its field forbids; "" if none."""
    import numpy as np

    fields = update.tensor_fields()
    for name in (name for name in update.tensors if fields[name].metadata["distinct"]):
        tensor = as_lazy(update.tensors[name])
        if not tensor.nbytes:
            continue
        index = tensor.numpy()
        # Pairs are compared as pairs: one number made of both overflows where positions are large.
        rows = [index] if len(fields[name].metadata["below"]) == 1 else [index[..., 0, :], index[..., 1, :]]
        order = np.lexsort(rows, axis=-1)
        sorted_rows = [np.take_along_axis(row, order, -1) for row in rows]
        if np.logical_and.reduce([row[..., 1:] == row[..., :-1] for row in sorted_rows]).any():
            return name
    return ""


def _size(axis: str, sizes: Mapping[str, Any]) -> int | None:
    """Return the size of an axis or product, or None if it is unknown."""
    try:
        return Axes.parse(axis).sizes(sizes)[0]
    except KeyError:
        return None
