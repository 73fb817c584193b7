"""Turn the unpickled values of a torch file into lazy tensors: a checked state dict, or nested dicts and values."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

from ..errors import Malformed
from .lazy import Lazy, Span, read_span
from .torch_values import ALONE, View, damaged, kind_of, short

Places = Mapping[str, int]
"""Storage key -> offset of its bytes in the file."""

_DEEPEST = 8
"""Most levels of nested dicts and lists."""
_VALUES = 1 << 20
"""Most values: ten for each tensor of the largest files, whose pickles hold about 100,000."""
_EXPANDED = 256 << 20
"""Most bytes that all tensors with overlapping elements may take together after expansion."""
_WRAPPERS = ("state_dict", "model", "model_state_dict")


def state_dict(path: str, value: object, places: Places) -> dict[str, Lazy]:
    """Return the tensors of a state dict by name.

    Raises:
        Malformed: the value is not a state dict, or a view leaves its storage.
    """
    return _lazies(path, _checked(value), places)


def nested(path: str, value: Any, places: Places) -> Any:
    """Return dicts and plain values unchanged, with lazy tensors in place of views.

    Raises:
        Malformed: there are too many values or levels. A pickle can refer to a value again by its number, so a few
            hundred bytes can describe billions of values. Each reference counts.
    """
    left = [_VALUES]

    def made(value: Any, depth: int) -> Any:
        left[0] -= 1
        if depth > _DEEPEST or left[0] < 0:
            raise damaged(f"more than {_DEEPEST} values inside each other, or more than {_VALUES:,}", "top level")
        if type(value) is View:
            return _lazies(path, {"tensor": value}, places)["tensor"]
        if type(value) is dict:
            return {name: made(inner, depth + 1) for name, inner in value.items()}
        if type(value) in (list, tuple):
            return type(value)(made(inner, depth + 1) for inner in value)
        return value

    return made(value, 0)


def _checked(value: object) -> dict[str, View]:
    if type(value) is dict:
        value = _unwrapped(value)
    if type(value) is not dict:
        raise Malformed(
            f"the file holds a value of type {kind_of(value)}, not a dict of tensors", where="top level", cure=ALONE
        )
    for name, view in value.items():
        if type(name) is not str or not name.isprintable():
            raise Malformed("a name that is not printable text", where=f"entry {short(str(name))}", cure=ALONE)
        if type(view) is not View:
            raise Malformed(f"is of type {kind_of(view)}, not a tensor", where=f"entry {short(name)}", cure=ALONE)
    return value


def _unwrapped(value: dict[Any, Any]) -> object:
    wrapper = next((name for name in _WRAPPERS if type(value.get(name)) is dict), None)
    if wrapper is None:
        return value
    if len(value) > 1:
        beside = next(name for name in value if name != wrapper)
        raise Malformed(f"stands beside the dict {wrapper!r}", where=f"entry {short(str(beside))}", cure=ALONE)
    return value[wrapper]


def _lazies(path: str, views: dict[str, View], places: Places) -> dict[str, Lazy]:
    lazies = {name: _lazy(path, view, places[view.storage.key]) for name, view in views.items()}
    # An expanded tensor has a stride of 0, so a few stored bytes can stand for gigabytes.
    expanded = {name: lazies[name].nbytes for name, view in views.items() if prod(view.shape) > view.extent}
    if sum(expanded.values()) > _EXPANDED:
        largest = max(expanded, key=lambda name: expanded[name])
        why = f"tensors whose elements overlap would take {sum(expanded.values())} bytes, more than {_EXPANDED}"
        raise Malformed(
            why, where=f"entry {short(largest)}", cure="Save them with `.clone()`, or before expanding them"
        )
    return lazies


def _lazy(path: str, view: View, place: int) -> Lazy:
    itemsize = view.dtype.itemsize
    first = place + (view.offset * itemsize if view.extent else 0)
    span = Span(path, first, view.extent * itemsize)
    if view.contiguous:
        return Lazy(view.shape, view.dtype, None, span)
    return Lazy(view.shape, view.dtype, partial(_gather, span, view))


def _gather(span: Span, view: View) -> bytes:
    import numpy as np

    data = np.frombuffer(read_span(span), dtype=view.dtype.numpy)
    steps = tuple(step * view.dtype.itemsize for step in view.stride)
    return np.lib.stride_tricks.as_strided(data, view.shape, steps, writeable=False).tobytes()
