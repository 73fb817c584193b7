"""Fitting: an adapter's numbers under the names of a model's slots, to be fed to it or written for onnxruntime."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..adapter import Adapter
from ..errors import ShapeMismatch, TargetNotFound, Unsupported, nearest
from ..tensors.lazy import as_array, from_numpy
from ..tensors.ort_adapter import OrtAdapter, write_ort_adapter
from .building import Array
from .injecting import loaded
from .model_file import opened
from .resolving import Found, resolve
from .slots import stem_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from .injecting import Model


def fit(model: Model, adapter: Adapter | str | PathLike[str]) -> dict[str, Array]:
    """What an adapter puts into the slots of a model.

    Args:
        model: an ONNX file, or a model in memory, that `inject` or `export` gave slots.
        adapter: the adapter, or its path; of any rank, at all of the slots' targets or at some.

    Returns:
        name of a slot -> numbers, in the slot's type.

    Raises:
        TargetNotFound: a target is not in the model, or has no slots of the adapter's method.
        ShapeMismatch: a tensor does not fit its slot.
        Unsupported: one slot would have to hold two tensors.
    """
    return _fitted(model, loaded(adapter, None)[0])[0]


def _fitted(model: Model, adapter: Adapter) -> tuple[dict[str, Array], list[dict[str, str]]]:
    """Slots and numbers; and of each update, field -> slot."""
    source = opened(model)
    slots = slots_of(source.model)
    feeds: dict[str, Array] = {}
    shared: dict[int, str] = {}
    names = [
        _fit(place, position, slots, feeds, shared)
        for place in resolve(source.model, adapter)
        for position in range(len(place.updates))
    ]
    return feeds, names


def write_adapter(model: Model, adapter: Adapter | str | PathLike[str], out: str | PathLike[str]) -> Path:
    """Writes an `.onnx_adapter` file of an adapter for the slots of a model; see `fit`.

    onnxruntime's `LoraAdapter` and `Session` load it. A record beside it says what its values mean: `adapterkit.read`
    reads them by that.
    """
    from ..formats.onnx_adapter import write_slots_record

    read, _ = loaded(adapter, None)
    feeds, names = _fitted(model, read)
    write_ort_adapter(out, OrtAdapter({name: from_numpy(array) for name, array in feeds.items()}))
    told = {name for fields in names for name in fields.values()}
    write_slots_record(read, names, [name for name in feeds if name not in told], Path(out))
    return Path(out)


def slots_of(model: ir.Model) -> dict[str, ir.Value]:
    """The inputs of a graph that may be left out, by name."""
    held = model.graph.initializers
    return {value.name: value for value in model.graph.inputs if value.name is not None and value.name in held}


def _fit(
    place: Found, position: int, slots: dict[str, ir.Value], feeds: dict[str, Array], shared: dict[int, str]
) -> dict[str, str]:
    """Puts an update's numbers into slots; returns field -> slot."""
    update, stem = place.updates[position], stem_of(place, position)
    scaling = update.attributes.get("scaling")
    leaves: dict[str, Any] = dict(update.tensors)
    names: dict[str, str] = {}
    if f"{stem}.scaling" in slots:
        leaves["scaling"] = from_numpy(np.array([1.0 if scaling is None else scaling]))
    for field, leaf in leaves.items():
        name = f"{stem}.{field}"
        if name not in slots and id(leaf) in shared:
            names[field] = shared[id(leaf)]
            continue
        if name not in slots:
            cure = nearest(name, slots) or "Export the model with slots for an adapter of this method"
            raise TargetNotFound(f"the model has no slot {name}", where=str(place.asked), cure=cure)
        array = as_array(leaf)
        shared[id(leaf)] = name
        if field in update.tensors:
            names[field] = name
        _check(name, array, slots[name], place)
        kind = slots[name].dtype
        cast = array if array.dtype.kind in "iu" or kind is None else array.astype(kind.numpy())
        if name in feeds and not np.array_equal(feeds[name], cast):
            raise Unsupported("two tensors for one slot", where=name, cure="Export the model with this adapter")
        feeds[name] = cast
    return names


def _check(name: str, array: Array, slot: ir.Value, place: Found) -> None:
    declared = list(slot.shape or ())
    fits = len(declared) == array.ndim and all(
        not isinstance(size, int) or size == own for size, own in zip(declared, array.shape, strict=True)
    )
    if not fits:
        why = f"{list(array.shape)} for a slot of {[size if isinstance(size, int) else 'any' for size in declared]}"
        raise ShapeMismatch(why, where=f"{place.asked}: {name}", cure="Is this adapter made for this base?")
