"""Match an adapter's tensors to the slots of a model, to feed them or to write an `.onnx_adapter` file."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.adapter import Adapter, Target
from ..core.updates import Update
from ..errors import ShapeMismatch, TargetNotFound, Unsupported, nearest, places_errors
from ..io.lazy import as_array, from_numpy
from ..io.ort_adapter import OrtAdapter, write_ort_adapter
from ..naming.binding import find_sites, renamed
from .building import Array
from .model_file import opened
from .reading import loaded
from .slots import SlotRecord, fixed_attributes, recorded, slots_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from .reading import Base, Model


@places_errors
def fit(
    model: Model, adapter: Adapter | str | PathLike[str], *, base_weights: Base | None = None,
    rename: str | Sequence[str] = (),
) -> dict[str, Array]:  # fmt: skip
    """Return the tensors that an adapter puts into the slots of a model.

    Args:
        model: an ONNX file or in-memory model to which `inject` or `export` gave slots.
        adapter: the adapter, or its path; of any rank, and at any subset of the slots' targets.
        base_weights: the base's weights, for adapter files whose values depend on them.
        rename: rules for names that cannot be resolved, as in `adapterkit.merge`.

    Returns:
        Slot name -> array, in the slot's dtype.

    Raises:
        TargetNotFound: the model lacks a target, or slots for the adapter's method there.
        ShapeMismatch: a tensor does not fit its slot.
        Unsupported: one slot would have to hold two different tensors.
        Malformed: the model's list of slots is damaged.
    """
    (read,) = renamed([loaded(adapter, base_weights)[0]], rename)
    return _fitted(model, read)[0]


@places_errors
def write_adapter(
    model: Model, adapter: Adapter | str | PathLike[str], out: str | PathLike[str], *, base_weights: Base | None = None,
    rename: str | Sequence[str] = (),
) -> Path:  # fmt: skip
    """Write an adapter as an `.onnx_adapter` file for the slots of a model; see `fit` for the arguments.

    onnxruntime's `LoraAdapter` and `Session` load it. A record beside it says what its values mean, so
    `adapterkit.read` can read them back.
    """
    from ..formats.onnx_adapter import write_slots_record

    (read,) = renamed([loaded(adapter, base_weights)[0]], rename)
    feeds, names = _fitted(model, read)
    write_ort_adapter(out, OrtAdapter({name: from_numpy(array) for name, array in feeds.items()}))
    told = {name for fields in names for name in fields.values()}
    write_slots_record(read, names, [name for name in feeds if name not in told], Path(out))
    return Path(out)


def _fitted(model: Model, adapter: Adapter) -> tuple[dict[str, Array], list[dict[str, str]]]:
    """Return slot -> array, and for each update of the adapter in order, field -> slot."""
    source = opened(model)
    slots, records = slots_of(source.model), recorded(source.model, source.path)
    feeds: dict[str, Array] = {}
    names = [
        _fill(update, fields, target, slots, feeds)
        for target, record in zip(adapter.updates, _records_of(adapter, records), strict=True)
        for update, fields in _paired(adapter.updates[target], record, target, slots)
    ]
    return feeds, names


def _records_of(adapter: Adapter, records: list[SlotRecord]) -> list[SlotRecord]:
    """Return the slots of each of an adapter's targets.

    Raises:
        TargetNotFound: a target has none; names the nearest.
    """
    known: dict[str, list[tuple[Target, SlotRecord]]] = {}
    for record in records:
        for name in {record.asked, record.target}:
            known.setdefault(name.path, []).append((name, record))
    try:
        sites = find_sites(adapter, dict.fromkeys(known, ()), partial=False, modules=known).sites
    except TargetNotFound as error:
        cure = f"{error.cure}. Give the model slots for this adapter: inject it with --mode slots, mode='slots'"
        raise TargetNotFound("the model has no slots for this target", where=error.where, cure=cure) from None
    return [
        _record_at(site.target, known[site.target.path], asked)
        for site, asked in zip(sites, adapter.updates, strict=True)
    ]


def _record_at(target: Target, records: list[tuple[Target, SlotRecord]], asked: Target) -> SlotRecord:
    """Return the record of a target's own rows; parts of a fused weight have one each."""
    for name, record in records:
        if name.rows == target.rows:
            return record
    rows = ", ".join(str(name) for name, _ in records)
    raise TargetNotFound(f"the model has no slots for these rows, but for {rows}", where=str(asked), cure=_MADE)


def _paired(
    updates: tuple[Update, ...], record: SlotRecord, target: Target, slots: dict[str, Any]
) -> list[tuple[Update, dict[str, str]]]:
    """Pair updates with their slots. Methods come in the record's order, and some of the record's may be missing."""
    pairs, left = [], list(record.updates)
    for update in updates:
        while left and left[0].method != update.method:
            left.pop(0)
        if not left:
            methods = ", ".join(each.method for each in record.updates)
            cure = nearest(f"{record.target}.{update.method}", slots) or _MADE
            raise TargetNotFound(
                f"the model has no slots for {update.method} there, but for {methods}", where=str(target), cure=cure
            )
        own = left.pop(0)
        # Attributes without a slot are baked into the graph's nodes, so the adapter must have the same values.
        if (fixed := fixed_attributes(update, own.fields)) != own.attributes:
            name = next(name for name in (fixed | own.attributes) if fixed.get(name) != own.attributes.get(name))
            why = f"{name} is {fixed.get(name)!r}, and {own.attributes.get(name)!r} in the model's nodes"
            raise Unsupported(why, where=f"{target}: {update.method}", cure=_MADE)
        pairs.append((update, own.fields))
    return pairs


def _fill(
    update: Update, fields: dict[str, str], target: Target, slots: dict[str, ir.Value], feeds: dict[str, Array]
) -> dict[str, str]:  # fmt: skip
    """Put an update's tensors into its slots; return field -> slot."""
    scaling = update.attributes.get("scaling")
    leaves: dict[str, Any] = dict(update.tensors)
    if "scaling" in fields:
        leaves["scaling"] = from_numpy(np.array([1.0 if scaling is None else scaling]))
    for field, leaf in leaves.items():
        if field not in fields:
            raise TargetNotFound(f"the model has no slot for {field}", where=str(target), cure=_MADE)
        name, array = fields[field], as_array(leaf)
        _check(name, array, slots[name], target)
        kind = slots[name].dtype
        cast = array if array.dtype.kind in "iu" or kind is None else array.astype(kind.numpy())
        if name in feeds and not np.array_equal(feeds[name], cast):
            raise Unsupported("two tensors for one slot", where=name, cure=_MADE)
        feeds[name] = cast
    return {field: fields[field] for field in update.tensors}


def _check(name: str, array: Array, slot: ir.Value, target: Target) -> None:
    declared = list(slot.shape or ())
    fits = len(declared) == array.ndim and all(
        not isinstance(size, int) or size == own for size, own in zip(declared, array.shape, strict=True)
    )
    if not fits:
        why = f"{list(array.shape)} for a slot of {[size if isinstance(size, int) else 'any' for size in declared]}"
        raise ShapeMismatch(why, where=f"{target}: {name}", cure="Is this adapter made for this base?")


_MADE = "Give the model slots for this adapter: inject it with --mode slots, mode='slots'"
