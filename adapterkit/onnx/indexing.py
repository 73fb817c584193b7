"""Indexing of graph values: slices, integers, new axes, and one list of positions, as nodes."""

from __future__ import annotations

from typing import Any

import numpy as np

from .sizes import FREE, Sizes, Unsayable
from .values import Value

_END = np.iinfo(np.int64).max


def taken(value: Value, key: Any) -> Value:
    """Return `value[key]`.

    Raises:
        Unsayable: the key has several lists, or a mask.
    """
    parts = _spread(value, key if isinstance(key, tuple) else (key,))
    out = _sliced(value, [(axis, part) for axis, part in parts if isinstance(part, slice | int) and axis is not None])
    lists = [(axis, part) for axis, part in parts if axis is not None and not isinstance(part, slice | int)]
    if len(lists) > 1:
        raise Unsayable("several lists of positions")
    wide = _gathered(out, *lists[0]) if lists else out
    return _shaped(wide, parts, lists)


def written(value: Value, key: Any, values: Value) -> Value:
    """Return `value` after `value[:, positions] = values` or `value[positions] = values`.

    Raises:
        Unsayable: the key has another form.
    """
    parts = key if isinstance(key, tuple) else (key,)
    *before, last = parts
    if any(part != slice(None) for part in before) or len(before) > 1 or not isinstance(last, list):
        raise Unsayable("no node writes there")
    turn = bool(before)
    index = np.array(last, dtype=np.int64)[:, None]
    # ScatterND indexes the leading axis, so the axis of the positions is moved there.
    rows, new = (value.swapaxes(0, 1), values.swapaxes(0, 1)) if turn else (value, values)

    def numbers(a: Any, b: Any) -> Any:
        out = a.copy()
        out[index[:, 0]] = b
        return out

    places = value.branch.building.literal(index)
    node = rows.branch.node("ScatterND", [rows.value, places, new.value], None, rows.dtype, rows.sizes)
    known = (lambda: numbers(rows.numbers(), new.numbers())) if rows.known and new.known else None
    scattered = Value(rows.branch, rows.sizes, rows.dtype, node, known)
    return scattered.swapaxes(0, 1) if turn else scattered


def _spread(value: Value, key: tuple[Any, ...]) -> list[tuple[int | None, Any]]:
    """Return (axis, part of the key) pairs with `...` expanded; axes after it are negative if the rank is unknown."""
    if not any(part is Ellipsis for part in key):
        return _numbered(key, 0)
    at = next(n for n, part in enumerate(key) if part is Ellipsis)
    before, behind = key[:at], key[at + 1 :]
    count = sum(part is not None for part in behind)
    if value.sizes is None:
        if any(part is None or isinstance(part, int) for part in key):
            raise Unsayable("the graph does not say how many axes it has")
        return [*_numbered(before, 0), *_numbered(behind, -count)]
    middle = [(axis, slice(None)) for axis in range(sum(p is not None for p in before), value.ndim - count)]
    return [*_numbered(before, 0), *middle, *_numbered(behind, value.ndim - count)]


def _numbered(parts: tuple[Any, ...], axis: int) -> list[tuple[int | None, Any]]:
    out: list[tuple[int | None, Any]] = []
    for part in parts:
        out.append((None, None) if part is None else (axis, part))
        axis += part is not None
    return out


def _sliced(value: Value, parts: list[tuple[int, Any]]) -> Value:
    """Apply slices, and integers as slices of length one."""
    cuts = [(axis, _cut(part)) for axis, part in parts if part != slice(None)]
    if not cuts:
        return value
    axes, starts, stops, steps = zip(*((axis, c.start, c.stop, c.step) for axis, c in cuts), strict=True)
    # Open sizes are represented by numbers from FREE on. A limit near such a number was computed from an open size.
    if any(abs(limit) >= FREE // 2 and limit != _END for limit in (*starts, *stops)):
        raise Unsayable("a slice of an open size")
    # A formula that loops over all positions of an open axis would never end.
    if any((size := value.sizes[axis]) is not None and size >= FREE for axis in axes if value.sizes is not None):
        raise Unsayable("a part of an axis of an open size")
    literal = value.branch.building.literal
    more = [literal(np.array(numbers, dtype=np.int64)) for numbers in (starts, stops, axes, steps)]

    def numbers(a: Any) -> Any:
        whole = [slice(None)] * a.ndim
        for axis, cut in cuts:
            whole[axis] = cut
        return a[tuple(whole)]

    return value.apply("Slice", [value], numbers, _cut_sizes(value.sizes, cuts), more=more)


def _cut(part: Any) -> slice:
    if isinstance(part, int):
        # For -1, the end would be 0, which is before the start.
        return slice(part, part + 1 if part != -1 else _END, 1)
    step = 1 if part.step is None else part.step
    if step < 1:
        raise Unsayable("a slice backwards")
    return slice(part.start or 0, _END if part.stop is None else part.stop, step)


def _cut_sizes(sizes: Sizes | None, cuts: list[tuple[int, slice]]) -> Sizes | None:
    if sizes is None:
        return None
    out = list(sizes)
    for axis, cut in cuts:
        size = out[axis]
        out[axis] = None if size is None or size >= FREE else len(range(size)[cut])
    return tuple(out)


def _gathered(value: Value, axis: int, positions: Any) -> Value:
    if value.sizes is not None and (value.sizes[axis] or 0) >= FREE:
        raise Unsayable("positions on an axis of an open size")
    if isinstance(positions, Value):
        index, shape = positions, positions.shape
    else:
        array = np.asarray(positions)
        if array.dtype.kind not in "iu":
            raise Unsayable("a mask")
        shape, index = array.shape, value.like(0)
        literal = value.branch.building.literal(array.astype(np.int64))
        index = Value(value.branch, array.shape, np.int64, literal, lambda: array)
    sizes = None if value.sizes is None or axis < 0 else (*value.sizes[:axis], *shape, *value.sizes[axis + 1 :])
    node = value.branch.node("Gather", [value.value, index.value], {"axis": axis}, value.dtype, sizes)
    known = (lambda: np.take(value.numbers(), index.numbers(), axis)) if value.known and index.known else None
    return Value(value.branch, sizes, value.dtype, node, known)


def _shaped(value: Value, parts: list[tuple[int | None, Any]], lists: list[tuple[int, Any]]) -> Value:
    """Remove the axes of integers, and insert new axes."""
    wider = 0
    if lists:
        wider = (lists[0][1].ndim if isinstance(lists[0][1], Value) else np.ndim(lists[0][1])) - 1
        if wider and (any(part is None or isinstance(part, int) for _, part in parts)):
            raise Unsayable("a list of lists beside new axes")
    gone = [axis for axis, part in parts if axis is not None and isinstance(part, int)]
    out = _without(value, gone) if gone else value
    kept = [part is None for _, part in parts if part is None or not isinstance(part, int)]
    new = [position for position, fresh in enumerate(kept) if fresh]
    return _with(out, new) if new else out


def _without(value: Value, axes: list[int]) -> Value:
    sizes = None if value.sizes is None else tuple(s for n, s in enumerate(value.sizes) if n not in axes)
    literal = value.branch.building.literal(np.array(axes, dtype=np.int64))
    return value.apply("Squeeze", [value], lambda a: np.squeeze(a, tuple(axes)), sizes, more=[literal])


def _with(value: Value, axes: list[int]) -> Value:
    sizes = None
    if value.sizes is not None:
        left = list(value.sizes)
        for axis in axes:
            left.insert(axis, 1)
        sizes = tuple(left)
    literal = value.branch.building.literal(np.array(axes, dtype=np.int64))
    return value.apply("Unsqueeze", [value], lambda a: np.expand_dims(a, tuple(axes)), sizes, more=[literal])
