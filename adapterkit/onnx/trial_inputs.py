"""Make up inputs to try a graph with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

SIZES = ((2, 4, 4, 4), (2, 3, 16, 16), (1, 1, 1, 1), (2, 32, 32, 32), (1, 576, 16, 16))
"""Values for open sizes by axis, tried one after the other."""

_TYPES = {
    "bool": np.bool_,
    "float": np.float32,
    "float16": np.float16,
    "double": np.float64,
    "int64": np.int64,
    "int32": np.int32,
}


def made_up(session: Any, sizes: Sequence[int]) -> dict[str, Any]:
    """Return inputs for a graph, with one size per name of an open axis; the first axis is the batch."""
    rng, known = np.random.default_rng(0), dict[str, int]()
    feeds: dict[str, Any] = {}
    entries = session.get_inputs()
    shapes = {entry.name: [_size(axis, n, known, sizes) for n, axis in enumerate(entry.shape)] for entry in entries}
    _count_past(shapes)
    for entry in entries:
        shape = shapes[entry.name]
        name = entry.type.removeprefix("tensor(").removesuffix(")")
        if name == "bool" or (name in ("int64", "int32") and "mask" in entry.name):
            feeds[entry.name] = _mask(shape).astype(_TYPES[name])
        elif name in ("int64", "int32"):
            # 0 and 1 are valid as tokens, token types and masks of any model.
            feeds[entry.name] = rng.integers(0, 2, shape).astype(_TYPES[name])
        else:
            feeds[entry.name] = rng.normal(size=shape).astype(_TYPES[name])
    return feeds


def _count_past(shapes: dict[str, list[int]]) -> None:
    """Extend the mask of a causal language model to cover its past."""
    past = next((shape[2] for name, shape in shapes.items() if "past" in name and len(shape) == 4), None)
    mask, tokens = shapes.get("attention_mask"), shapes.get("input_ids")
    if past is not None and mask is not None and tokens is not None and len(mask) == len(tokens) == 2:
        mask[1] = past + tokens[1]


def _mask(shape: Sequence[int]) -> np.ndarray[Any, Any]:
    """Return ones with the last entry off: whether 0 or 1 means hidden, something stays visible."""
    mask = np.ones(shape, dtype=bool)
    if mask.ndim and mask.shape[-1] > 1:
        mask[..., -1] = False
    return mask


def _size(axis: Any, position: int, known: dict[str, int], sizes: Sequence[int]) -> int:
    if isinstance(axis, int):
        return axis
    return known.setdefault(str(axis), sizes[min(position, len(sizes) - 1)])
