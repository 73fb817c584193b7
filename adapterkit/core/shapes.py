"""Shape strings such as `"r in *k"` document the shape of a tensor field, check tensors, and shape the test examples.

A shape string is a list of axes separated by spaces. An axis is an integer, a name, or a product or quotient of
integers and names (`out/b`, `r*n`). At most one axis is `*name`, which stands for any number of axes. When a tensor's
shape is compared with a shape string, the names get their sizes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..errors import ShapeMismatch

Dims = dict[str, int | tuple[int, ...]]
"""Sizes by axis name; a starred name has a tuple, the sizes of all axes that it stands for."""

_AXIS = re.compile(r"\*[a-z_]\w*|(?:[a-z_]\w*|\d+)(?:[*/](?:[a-z_]\w*|\d+))*")


@dataclass(frozen=True, slots=True)
class Axes:
    """A parsed shape string."""

    text: str
    axes: tuple[str, ...]
    star: int | None
    """Position of the starred axis, or None."""

    @staticmethod
    def parse(text: str) -> Axes:
        return _parse(text)

    @property
    def plain(self) -> bool:
        """Whether all axes are integers or names, without products and quotients."""
        return all(axis.lstrip("*").isalnum() or axis.lstrip("*").isidentifier() for axis in self.axes)

    def index(self, axis: str) -> int | None:
        """Return the index of an axis. After a starred axis, the index is negative, counted from the back.

        None if no axis of the string is exactly this name.
        """
        if axis not in self.axes:
            return None
        position = self.axes.index(axis)
        return position - len(self.axes) if self.star is not None and position > self.star else position

    def bind(self, shape: tuple[int, ...], dims: Dims, what: str) -> None:
        """Compare a tensor's shape with this string, and add the sizes of the string's names to `dims`.

        Raises:
            ShapeMismatch: the shape does not match this string, or contradicts a size in `dims`.
        """
        star = self.star
        fixed = len(self.axes) - (star is not None)
        if len(shape) < fixed or (star is None and len(shape) != fixed):
            raise _mismatch(self, shape, dims, what)
        extra = len(shape) - fixed
        at = 0
        for axis in self.axes:
            if axis.startswith("*"):
                ok = dims.setdefault(axis[1:], shape[at : at + extra]) == shape[at : at + extra]
                at += extra
            else:
                ok = _bind_axis(axis, shape[at], dims)
                at += 1
            if not ok:
                raise _mismatch(self, shape, dims, what)

    def sizes(self, dims: Mapping[str, int | tuple[int, ...]]) -> tuple[int, ...]:
        """Return the shape that this string describes if its names have the sizes in `dims`."""
        shape: list[int] = []
        for axis in self.axes:
            if axis.startswith("*"):
                rest = dims.get(axis[1:], ())
                shape.extend(rest if isinstance(rest, tuple) else (rest,))
            else:
                shape.append(_evaluate(axis, dims))
        return tuple(shape)


@cache
def _parse(text: str) -> Axes:
    axes = tuple(text.split())
    bad = next((axis for axis in axes if not _AXIS.fullmatch(axis)), None)
    if bad is not None or sum(axis.startswith("*") for axis in axes) > 1:
        raise ValueError(f"the shape string {text!r} is not valid")
    return Axes(text, axes, next((i for i, axis in enumerate(axes) if axis.startswith("*")), None))


def tensor(
    shape: str, *, optional: bool = False, integer: bool = False, below: str = "", distinct: bool = False
) -> Any:
    """Declare a dataclass field for a tensor with a shape string.

    Args:
        shape: the shape string.
        optional: True if the tensor may be missing (None).
        integer: True if the tensor contains indices instead of real numbers.
        below: the axis, or product of axes, that the indices refer to; each index is below the axis's size. If the
            tensor has two rows, the first and the second indices of pairs, one axis for each row.
        distinct: True if no index (or pair) may repeat.
    """
    indices = {"integer": integer, "below": tuple(below.split()), "distinct": distinct}
    metadata = {"axes": Axes.parse(shape), "optional": optional, **indices}
    return dataclasses.field(default=None, metadata=metadata) if optional else dataclasses.field(metadata=metadata)


def _bind_axis(axis: str, size: int, dims: Dims) -> bool:
    if axis.isidentifier():
        return dims.setdefault(axis, size) == size
    unknown = [name for name in re.findall(r"[a-z_]\w*", axis) if name not in dims]
    if len(unknown) == 1:
        return _solve(axis, unknown[0], size, dims)
    return bool(unknown) or _evaluate(axis, dims) == size


def _solve(axis: str, name: str, size: int, dims: Dims) -> bool:
    for trial in _candidates(axis, name, size, dims):
        if trial > 0 and _evaluate(axis, {**dims, name: trial}) == size:
            dims[name] = trial
            return True
    return False


def _candidates(axis: str, name: str, size: int, dims: Dims) -> tuple[int, ...]:
    above, below = (math.prod(_value(part, {**dims, name: 1}) for part in parts) for parts in _factors(axis))
    return size * below // max(above, 1), above // max(size * below, 1)


@cache
def _factors(axis: str) -> tuple[tuple[str | int, ...], tuple[str | int, ...]]:
    """Return the names and numbers in an axis's numerator, and those in its denominator."""
    found: dict[str, list[str | int]] = {"*": [], "/": []}
    for operator, part in re.findall(r"([*/])(\w+)", "*" + axis):
        found[operator].append(int(part) if part.isdigit() else part)
    return tuple(found["*"]), tuple(found["/"])


def _value(part: str | int, dims: Mapping[str, int | tuple[int, ...]]) -> int:
    size = dims[part] if isinstance(part, str) else part
    if not isinstance(size, int):
        raise ValueError(f"{part} stands for several axes")
    return size


def _evaluate(axis: str, dims: Mapping[str, int | tuple[int, ...]]) -> int:
    parts_above, parts_below = _factors(axis)
    above = math.prod([_value(part, dims) for part in parts_above])
    below = math.prod([_value(part, dims) for part in parts_below])
    return above // below if below and above % below == 0 else -1


def _mismatch(axes: Axes, shape: tuple[int, ...], dims: Dims, what: str) -> ShapeMismatch:
    known = ", ".join(f"{name}={size}" for name, size in dims.items())
    why = f"shape {list(shape)} is not [{axes.text}]" + (f" with {known}" if known else "")
    return ShapeMismatch(why, where=what, cure="The other tensors of the update, or the file's rank, contradict it")
