"""Check what is fed to a session: dtypes of inputs, and whether tensors fit their slots and each other."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np

from ..errors import ShapeMismatch, TargetNotFound, Unsupported, nearest
from .building import Array

_KINDS = {
    "float": "float32", "double": "float64", "float16": "float16", "bfloat16": "bfloat16", "bool": "bool",
    **{name: name for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
}  # fmt: skip
"""onnxruntime's name of an element type -> numpy's."""


def check_slot(name: str, array: Array, slots: Mapping[str, Any], path: Any) -> None:
    """Check one tensor against its slot.

    Raises:
        TargetNotFound: there is no such slot; names the nearest.
        ShapeMismatch: the tensor has another dtype or shape.
    """
    if name not in slots:
        cure = nearest(name, slots) or ("Is it made for this model?" if slots else "Export the model with slots")
        raise TargetNotFound(f"the model has no slot {name}", path=path, cure=cure)
    declared, kind = slots[name].shape, kind_of(slots[name])
    if array.dtype != kind:
        raise ShapeMismatch(f"{array.dtype} for a slot of {kind}", path=path, where=name, cure=_MADE)
    sizes = zip(declared, array.shape, strict=False)
    if len(declared) != array.ndim or any(isinstance(size, int) and size != own for size, own in sizes):
        raise ShapeMismatch(f"{list(array.shape)} for a slot of {declared}", path=path, where=name, cure=_MADE)


def check_together(feeds: Mapping[str, Array], slots: Mapping[str, Any], path: Any) -> None:
    """Check that the slots of one update agree on open sizes such as the rank; a missing slot counts as size 0.

    Raises:
        ShapeMismatch: they disagree.
    """
    stems = {name.rpartition(".")[0] for name in feeds}
    open_sizes: dict[tuple[str, str], int] = {}
    for name, entry in slots.items():
        stem = name.rpartition(".")[0]
        for axis, size in enumerate(entry.shape):
            if stem not in stems or not isinstance(size, str) or not size.startswith(f"{name}."):
                continue
            own = feeds[name].shape[axis] if name in feeds else 0
            word = size.removeprefix(f"{name}.")
            if open_sizes.setdefault((stem, word), own) != own:
                why = f"{word} is {own} here and {open_sizes[stem, word]} in the tensor beside it"
                raise ShapeMismatch(why, path=path, where=name, cure=_MADE)


def kind_of(entry: Any) -> np.dtype[Any]:
    """Return the numpy dtype of a session's input or slot.

    Raises:
        Unsupported: arrays have no such type.
    """
    name = _KINDS.get(entry.type.removeprefix("tensor(").removesuffix(")"))
    if name is None:
        raise Unsupported(f"an input of {entry.type}", where=entry.name, cure="Run the model with onnxruntime itself")
    if name == "bfloat16":
        kind: np.dtype[Any] = np.dtype(import_module("ml_dtypes").bfloat16)
        return kind
    return np.dtype(name)


_MADE = "Write the adapter for this model by adapterkit.onnx.write_adapter"
