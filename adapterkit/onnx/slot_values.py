"""Match an adapter's tensors with the slots of a model, to feed the slots or to write an `.onnx_adapter` file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..core.adapter import Adapter, Target
from ..core.arguments import checks_types
from ..core.updates import Update
from ..errors import Malformed, ShapeMismatch, TargetNotFound, Unsupported, nearest, places_errors
from ..io.checkpoint import opened as opened_base
from ..io.lazy import as_array, from_numpy
from ..io.ort_adapter import OrtAdapter, write_ort_adapter
from ..io.safetensors import write as write_safetensors
from ..naming.binding import find_sites, renamed
from .building import Array
from .heads import in_parts
from .model_file import GraphSource, opened
from .open_factors import is_worked_out, worked_out
from .reading import known_config, loaded
from .routed import by_expert
from .slots import SlotRecord, baked_attributes, fills_of, neutral_of, recorded, sizes_of, slots_of

if TYPE_CHECKING:
    from .reading import Base, Model


@checks_types
@places_errors
def fit(
    model: Model, adapter: Adapter | str | PathLike[str], *, base_weights: Base | None = None,
    rename: str | Sequence[str] = (),
) -> dict[str, Array]:  # fmt: skip
    """Match an adapter's tensors with a model's slots, and return the values to feed to the slots.

    Args:
        model: an ONNX file or in-memory model to which `inject` or `export` gave slots.
        adapter: the adapter, or its path. The adapter can have any rank that the slots' shapes allow. It need not have
            an update for every target that has slots.
        base_weights: the base's weights, for adapter files whose values depend on them.
        rename: rules for names that cannot be resolved, as in `adapterkit.merge`.

    Returns:
        A map from each slot's name to an array, in the slot's dtype.

    Raises:
        TargetNotFound: the model has no slots for a target, or the slots of a target are for another method.
        ShapeMismatch: a tensor does not fit its slot.
        Unsupported: two different tensors have the same slot; or an attribute of an update has no slot, and its value
            differs from the constant in the model's nodes.
        Malformed: the model's list of slots is damaged, or a number is too large for its slot's dtype.
    """
    return fit_opened(opened(model), adapter, base_weights=base_weights, rename=rename)


def fit_opened(
    source: GraphSource, adapter: Adapter | str | PathLike[str], *, base_weights: Base | None = None,
    rename: str | Sequence[str] = (),
) -> dict[str, Array]:  # fmt: skip
    """Do what `fit` does, for a model that is already open."""
    (read,) = renamed([loaded(adapter, base_weights)[0]], rename)
    return _fitted(source, read, base_weights)[1]


@checks_types
@places_errors
def write_adapter(
    model: Model, adapter: Adapter | str | PathLike[str], out: str | PathLike[str], *, base_weights: Base | None = None,
    rename: str | Sequence[str] = (),
) -> Path:  # fmt: skip
    """Write an adapter as an `.onnx_adapter` file that fills the slots of a model; see `fit` for the arguments.

    onnxruntime's `LoraAdapter` and `Session` load the file. A second file beside it describes the tensors, so that
    `adapterkit.read` can read the adapter back. If `out` ends with `.safetensors`, this function writes a safetensors
    file instead, whose keys are the names of the slots. The safetensors file is for runtimes that do not read
    `.onnx_adapter` files; `Session` also loads it. If the slots are required inputs, a file of either kind has a tensor
    for every slot. If the adapter has no values for a slot, the slot's tensor leaves the base's results unchanged.
    """
    from ..formats.onnx_adapter import write_slots_record

    (read,) = renamed([loaded(adapter, base_weights)[0]], rename)
    source = opened(model)
    read, feeds, names = _fitted(source, read, base_weights)
    feeds = neutral_of(source.model) | feeds
    write_slot_values(feeds, out)
    if str(out).lower().endswith(SAFETENSORS) or not all(names):
        return Path(out)  # Values of stacks, experts and computed factors cannot be read back.
    named = {name for fields in names for name in fields.values()}
    write_slots_record(read, names, [name for name in feeds if name not in named], Path(out))
    return Path(out)


def slotted(source: GraphSource, adapter: Adapter) -> tuple[Adapter, tuple[Target, ...]]:
    """Return the adapter without the targets that have no slots in a graph, and a tuple of the removed targets.

    Raises:
        TargetNotFound: the graph has no slots at all.
        Malformed: the graph's list of slots is damaged.
    """
    records = recorded(source.model, source.path)
    parts, whole, _ = _as_stored(adapter, source, records, None)
    known = dict.fromkeys((name.path for record in records for name in (record.asked, record.target)), ())
    try:
        missing: Collection[Target] = find_sites(parts, known, partial=True, modules=known).missing
    except TargetNotFound:  # The graph has none of the targets.
        missing = parts.updates
    lost = tuple(dict.fromkeys(whole.get(target, target) for target in missing))
    gone = set(lost)
    return adapter.replace(updates={t: group for t, group in adapter.updates.items() if t not in gone}), lost


SAFETENSORS = ".safetensors"

KIND = {"format": "adapterkit.slots"}
"""Metadata that marks a safetensors file whose tensors are named after slots."""


def write_slot_values(feeds: Mapping[str, Array], out: str | PathLike[str]) -> None:
    """Write tensors for slots: as safetensors if `out` ends with `.safetensors`, else as an `.onnx_adapter` file."""
    tensors = {name: from_numpy(array) for name, array in feeds.items()}
    if str(out).lower().endswith(SAFETENSORS):
        write_safetensors(out, tensors, KIND)
    else:
        write_ort_adapter(out, OrtAdapter(tensors))


def _fitted(
    source: GraphSource, adapter: Adapter, base: Base | None
) -> tuple[Adapter, dict[str, Array], list[dict[str, str]]]:
    """Match an adapter's tensors with the slots of a graph.

    Returns:
        the adapter, in which updates of fused layers and of stacks of experts are split (see `_as_stored`); a map from
        slot names to arrays; and a list with one map for each update, from the update's fields to slot names. The map
        of an update is empty if the update cannot be read back from the slots.
    """
    slots, records = slots_of(source.model), recorded(source.model, source.path)
    feeds: dict[str, Array] = {}
    adapter, _, experts = _as_stored(adapter, source, records, base)
    fill = _fill_rows if _by_rows(source.model) else _fill
    names = []
    for target, record in zip(adapter.updates, _records_of(adapter, records), strict=True):
        for update, fields in _paired(adapter.updates[target], record, target, slots):
            if is_worked_out(update, fields):
                (factors,) = worked_out(source.model, adapter, target, record.target, base)
                fill(factors, fields, target, slots, feeds)
                names.append(dict[str, str]())
            else:
                filled = fill(update, fields, target, slots, feeds)
                # Experts have other names in the graph than in the model, so an expert's update cannot be read back.
                names.append(dict[str, str]() if target in experts else filled)
    if not _by_rows(source.model):
        _fill_beside(records, slots, feeds, fills_of(source.model.metadata_props))
    return adapter, feeds, names


def _fill_beside(
    records: list[SlotRecord], slots: dict[str, ir.Value], feeds: dict[str, Array], fills: Mapping[str, float]
) -> None:
    """Add values for targets that the adapter does not change, but that share a slot with a target that it changes.

    VeRA's projections are an example of shared slots. Their dynamic size does not fit the sizes of the other slots'
    defaults. The added values are constant, like the defaults, so they do not change the base's results.
    """
    given = set(feeds)
    for fields in (update.fields for record in records for update in record.updates):
        shared = given.intersection(fields.values())
        if len(shared) in (0, len(fields)):
            continue
        sizes: dict[str, int] = {}
        for name in shared:
            pairs = zip(slots[name].shape or (), feeds[name].shape, strict=True)
            sizes |= {_axis(size): wanted for size, wanted in pairs if not isinstance(size, int)}
        for name in set(fields.values()) - given:
            declared, dtype = sizes_of(slots[name])
            shape = [size if isinstance(size, int) else sizes.get(_axis(size)) for size in declared]
            default = slots[name].const_value
            fixed = all(isinstance(size, int) for size in declared)
            if not fixed and None not in shape and (default is None or not default.size):
                feeds[name] = np.full([size or 0 for size in shape], fills.get(name, 0.0), dtype)


def _axis(size: object) -> str:
    """Return the axis of a slot's dynamic size, such as `r` of `q.vera.A.r`."""
    return str(getattr(size, "value", size)).rpartition(".")[2]


def _as_stored(
    adapter: Adapter, source: GraphSource, records: list[SlotRecord], base: Base | None
) -> tuple[Adapter, dict[Target, Target], Collection[Target]]:
    """Split updates of fused layers and of stacks of experts into the parts that have separate slots.

    Returns:
        the adapter with split updates; a map from each new target to the target that was split; and the new targets
        that are experts.
    """
    config = known_config(None if base is None else opened_base(base), source.path)
    adapter, experts = by_expert(adapter, source.model, config)
    adapter, whole = in_parts(adapter, _rows_in(records, slots_of(source.model)))
    return adapter, whole | experts, experts.keys()


def _rows_in(records: list[SlotRecord], slots: dict[str, ir.Value]) -> Callable[[str], int | None]:
    """Return a function that takes a target's path, and returns the target's number of rows.

    The function reads the number from the shape of one of the target's slots. It returns 0 if no slot shows the number,
    and None if the path has no slots.
    """
    rows: dict[str, int | None] = {}
    for record in records:
        for update in record.updates:
            field = next((word for word in ("B", "l", "magnitude") if word in update.fields), None)
            shape = None if field is None else slots[update.fields[field]].shape
            sizes = [] if shape is None else [size for size in shape if isinstance(size, int)]
            rows[record.asked.path] = sizes[-1] if sizes else 0
    return rows.get


def _records_of(adapter: Adapter, records: list[SlotRecord]) -> list[SlotRecord]:
    """Return the records of the adapter's targets, in the order of the targets.

    Raises:
        TargetNotFound: a target has no slots; the error gives the most similar name of a target with slots.
    """
    known: dict[str, list[tuple[Target, SlotRecord]]] = {}
    for record in records:
        for name in {record.asked, record.target}:
            known.setdefault(name.path, []).append((name, record))
    try:
        sites = find_sites(adapter, dict.fromkeys(known, ()), partial=False, modules=known).sites
    except TargetNotFound as error:
        cure = f"{error.cure}. For slots that fit this adapter, inject the adapter with --mode slots (mode='slots')"
        raise TargetNotFound("the model has no slots for this target", where=error.where, cure=cure) from None
    return [
        _record_at(site.target, known[site.target.path], asked)
        for site, asked in zip(sites, adapter.updates, strict=True)
    ]


def _record_at(target: Target, records: list[tuple[Target, SlotRecord]], asked: Target) -> SlotRecord:
    """Return the record that has the target's rows. A fused weight has one record for each of its parts.

    Raises:
        TargetNotFound: no record has these rows.
    """
    for name, record in records:
        if name.rows == target.rows:
            return record
    rows = ", ".join(str(name) for name, _ in records)
    raise TargetNotFound(
        f"the model has no slots for these rows; it has slots for {rows}", where=str(asked), cure=_INJECT_SLOTS
    )


def _paired(
    updates: tuple[Update, ...], record: SlotRecord, target: Target, slots: dict[str, ir.Value]
) -> list[tuple[Update, dict[str, str]]]:
    """Pair each update of a target with the update's slots.

    The target may lack some of the record's updates. The target's updates must be in the record's order.

    Raises:
        TargetNotFound: the record has no slots for an update's method.
        Unsupported: an attribute of an update has no slot, and differs from the constant in the graph's nodes.
    """
    pairs, left = [], list(record.updates)
    for update in updates:
        while left and left[0].method != update.method:
            left.pop(0)
        if not left:
            methods = ", ".join(each.method for each in record.updates)
            cure = nearest(f"{record.target}.{update.method}", slots) or _INJECT_SLOTS
            raise TargetNotFound(
                f"the model has no slots for {update.method} at this target; it has slots for {methods}",
                where=str(target),
                cure=cure,
            )
        slot_update = left.pop(0)
        # An attribute that has no slot is a constant in the graph's nodes, so the adapter must have the same value.
        if (fixed := baked_attributes(update, slot_update.fields)) != slot_update.attributes:
            name = next(
                name for name in (fixed | slot_update.attributes) if fixed.get(name) != slot_update.attributes.get(name)
            )
            why = (
                f"{name} is {fixed.get(name)!r} in the adapter, but {slot_update.attributes.get(name)!r} in the "
                "model's nodes"
            )
            raise Unsupported(why, where=f"{target}: {update.method}", cure=_INJECT_SLOTS)
        pairs.append((update, slot_update.fields))
    return pairs


def _fill(
    update: Update, fields: dict[str, str], target: Target, slots: dict[str, ir.Value], feeds: dict[str, Array]
) -> dict[str, str]:  # fmt: skip
    """Add an update's tensors to `feeds`, under the names of their slots; return a map from fields to slot names."""
    scaling = update.attributes.get("scaling")
    leaves: dict[str, Any] = dict(update.tensors)
    if "scaling" in fields:
        leaves["scaling"] = from_numpy(np.array([1.0 if scaling is None else scaling]))
    for field, leaf in leaves.items():
        if field not in fields:
            raise TargetNotFound(f"the model has no slot for {field}", where=str(target), cure=_INJECT_SLOTS)
        name = fields[field]
        array = _padded(update, field, as_array(leaf), slots[name])
        _check(name, array, slots[name], target)
        cast = _cast(name, array, slots[name], target)
        if name in feeds and not np.array_equal(feeds[name], cast):
            raise Unsupported("two tensors with different values have the same slot", where=name, cure=_INJECT_SLOTS)
        feeds[name] = cast
    return {field: fields[field] for field in update.tensors}


RANKED = ("lora", "open_factors")
"""Methods whose factors may be padded with zeros along the rank."""


def _padded(update: Update, field: str, array: Array, slot: ir.Value) -> Array:
    """Pad a factor with zeros to the rank of its slot, if the slot's rank is fixed. The zeros do not change results."""
    if update.method not in RANKED or field not in ("A", "B") or slot.shape is None or len(slot.shape) != array.ndim:
        return array
    axis = 0 if field == "A" else 1
    wanted = slot.shape[axis]
    if not isinstance(wanted, int) or wanted <= array.shape[axis]:
        return array
    more = [(0, 0)] * array.ndim
    more[axis] = (0, wanted - array.shape[axis])
    return np.pad(array, more)


def _by_rows(model: ir.Model) -> bool:
    """Whether each slot of the graph holds a stack of several adapters' factors; see rowwise.py."""
    from .rowwise import ROWS

    return ROWS in model.metadata_props


def _fill_rows(
    update: Update, fields: dict[str, str], target: Target, slots: dict[str, ir.Value], feeds: dict[str, Array]
) -> dict[str, str]:  # fmt: skip
    """Add an update's factors to `feeds`, for a graph whose slots hold stacks of factors; see `_by_rows`.

    The added stack contains the factors of only one adapter.
    """
    from .rowwise import factors_of

    for field in update.tensors:
        if field not in fields:
            raise TargetNotFound(f"the model has no slot for {field}", where=str(target), cure=_INJECT_SLOTS)
    for field, array in factors_of(update).items():
        name = fields[field]
        _check(name, array, slots[name], target)
        feeds[name] = _cast(name, array, slots[name], target)
    return {}


def _cast(name: str, array: Array, slot: ir.Value, target: Target) -> Array:
    """Convert a tensor to its slot's dtype; return integers unchanged.

    Raises:
        Malformed: a number is too large for the dtype.
    """
    if array.dtype.kind in "iu" or slot.dtype is None:
        return array
    with np.errstate(over="ignore"):
        cast: Array = array.astype(slot.dtype.numpy())
    if not np.isfinite(cast).all():
        why = f"a number is too large for the slot's dtype {cast.dtype}"
        raise Malformed(why, where=f"{target}: {name}", cure="Export the model in float32 or bfloat16")
    return cast


def _check(name: str, array: Array, slot: ir.Value, target: Target) -> None:
    declared = list(slot.shape or ())
    fits = len(declared) == array.ndim and all(
        not isinstance(size, int) or size == wanted for size, wanted in zip(declared, array.shape, strict=True)
    )
    if not fits:
        why = (
            f"the tensor's shape is {list(array.shape)}, but the slot's shape is "
            f"{[size if isinstance(size, int) else 'any' for size in declared]}"
        )
        cure = (
            "Pass an adapter that was made for this base. With --mode inputs (mode='inputs'), the slots of "
            "convolutions have a fixed rank"
        )
        raise ShapeMismatch(why, where=f"{target}: {name}", cure=cure)


_INJECT_SLOTS = "For slots that fit this adapter, inject the adapter with --mode slots (mode='slots')"
