"""Sizes of values: how operators change them, and how to write the shape input of a Reshape."""

from __future__ import annotations

import math
from collections.abc import Sequence

Sizes = tuple[int | None, ...]
"""The sizes of a value's axes; None for an open size."""

FREE = 1 << 40
"""Numbers from here on represent sizes that are open until an adapter is loaded; see slots.py."""


class Unsayable(AttributeError, TypeError):
    """A formula needs something that no node expresses; it may still be computed if all numbers are known."""


def broadcast(one: Sizes | None, two: Sizes | None) -> Sizes | None:
    """Return the sizes of two operands' sum."""
    if one is None or two is None:
        return None
    pad = max(len(one), len(two))
    pairs = zip((1,) * (pad - len(one)) + one, (1,) * (pad - len(two)) + two, strict=True)
    return tuple(_wider(a, b) for a, b in pairs)


def _wider(a: int | None, b: int | None) -> int | None:
    if a == b or b == 1:
        return a
    if a == 1 or a is None:
        return b
    return a


def multiplied(one: Sizes | None, two: Sizes | None) -> Sizes | None:
    """Return the sizes of two matrices' product.

    Raises:
        Unsayable: the sizes do not match.
    """
    if one is None or two is None or len(one) < 2 or len(two) < 2:
        return None
    columns, rows = one[-1], two[-2]
    if columns is not None and rows is not None and columns != rows and max(columns, rows) < FREE:
        raise Unsayable(f"a product of {columns} columns and {rows} rows")
    lead = broadcast(one[:-2], two[:-2])
    assert lead is not None
    return (*lead, one[-2], two[-1])


def filled(sizes: Sizes | None, wanted: Sequence[int | None]) -> Sizes:
    """Return a wanted shape with its -1 resolved, or None in its place if that is impossible.

    An open size in it refers to the same axis, which keeps its size.
    """
    if -1 not in wanted:
        return tuple(wanted)
    stays = _staying(sizes, wanted)
    left = None if sizes is None else [size for place, size in enumerate(sizes) if place not in stays]
    if left is None or None in left:
        return tuple(None if size == -1 else size for size in wanted)
    known = math.prod(size for place, size in enumerate(wanted) if size and size > 0 and place not in stays)
    total = math.prod(left)  # type: ignore[arg-type]
    return tuple((total // known if known else 0) if size == -1 else size for size in wanted)


def spelled(sizes: Sizes | None, wanted: Sequence[int | None], worked_out: Sizes) -> list[int]:
    """Return a shape in the node's notation: 0 for an open size that stays, -1 for the remaining one.

    Args:
        sizes: the current sizes.
        wanted: the requested shape.
        worked_out: the result of `filled`.
    """
    out: list[int] = []
    stays = _staying(sizes, wanted)
    for position, size in enumerate(worked_out):
        if size is not None and 0 < size < FREE:
            out.append(size)
        elif position in stays:
            out.append(0)
        elif size == 0 or -1 in out:
            raise Unsayable("more than one size is open")
        else:
            out.append(-1)
    if -1 in out and 0 in out:
        raise Unsayable("a size that is left over where another may be 0")
    return out


def _staying(sizes: Sizes | None, wanted: Sequence[int | None]) -> set[int]:
    """Return the axes that have an open size and keep it."""
    pairs = enumerate(zip(sizes or (), wanted, strict=False))
    return {place for place, (size, other) in pairs if size == other and (size is None or size >= FREE)}


def reduced(sizes: Sizes | None, axes: tuple[int, ...] | None, keepdims: bool) -> Sizes | None:
    """Return the sizes of a value reduced along some axes, or all."""
    if sizes is None:
        return None
    gone = set(range(len(sizes))) if axes is None else {axis % len(sizes) for axis in axes}
    kept = ((1 if n in gone else size) for n, size in enumerate(sizes) if keepdims or n not in gone)
    return tuple(kept)
