"""Slots: an adapter's tensors as optional graph inputs, so that adapters can be swapped at run time.

A slot's default changes nothing: inner sizes such as the rank are 0 in it (1 for convolutions), and open at run time.
Numbers such as `scaling` are slots of shape `[1]`. A formula runs over such values while the graph is built. Each open
size is then represented by a number that no real size has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..core.adapter import Adapter, Target
from ..core.shapes import Axes
from ..core.updates import OutputUpdate, Update
from ..errors import Malformed, ShapeMismatch, TargetNotFound, Unsupported, first_line, nearest, places_errors
from ..io.lazy import as_array, from_numpy
from ..io.ort_adapter import OrtAdapter, write_ort_adapter
from ..io.safetensors import write as write_safetensors
from ..naming.binding import find_sites, renamed
from .building import FREE, Array, Building, element_type
from .found import Found
from .heads import in_parts
from .layers import Conv, Layer, LeftMatMul
from .model_file import opened
from .open_factors import is_worked_out, template, worked_out
from .reading import loaded
from .values import OpenSize, Value

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue
    from .reading import Base, Model


RECORD = "adapterkit.slots"
"""Metadata key of the model under which each target's slots are listed."""

REQUIRED = "adapterkit.required"
"""Metadata key of a model whose slots are required inputs: slot -> the number that fills it without an adapter."""

FIXED = frozenset({"out", "in", "k", "rest", "columns", "hidden", "first", "second", "outs", "ins", "shorts", "longs"})
"""Axes whose size is given by the base, or shared by all layers."""


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """One overridable input of the graph.

    Attributes:
        value: the input, an initializer that is listed among the graph's inputs as well.
        shape: its sizes; numbers from `FREE` on for open ones.
        dtype: the type of its elements.
    """

    value: ir.Value
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True, slots=True)
class SlotUpdate:
    """The slots of one update.

    Attributes:
        method: the update's method.
        attributes: its plain values that the graph's nodes fix.
        fields: field -> name of the slot.
    """

    method: str
    attributes: dict[str, Any]
    fields: dict[str, str]


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """The slots of one target.

    Attributes:
        asked: the target under the name that the adapter has for it.
        target: the target under the graph's own name.
        updates: for each update in order, its slots.
    """

    asked: Target
    target: Target
    updates: list[SlotUpdate]

    @classmethod
    def of(cls, place: Found) -> SlotRecord:
        """A record of a target without any slots yet."""
        return cls(
            Target(place.asked.path, rows=place.asked.rows), Target(place.target.path, rows=place.target.rows), []
        )

    def plain(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {
            "asked": [self.asked.path, self.asked.rows], "target": [self.target.path, self.target.rows],
            "updates": [[each.method, each.attributes, each.fields] for each in self.updates],
        }  # fmt: skip


def recorded(model: ir.Model, path: Path | None) -> list[SlotRecord]:
    """Read the list of a model's slots.

    Args:
        model: a model that `inject` or `export` gave slots.
        path: its file, for errors.

    Raises:
        TargetNotFound: the model has no slots, or none that this version wrote.
        Malformed: the list is damaged, or names slots that the graph does not have.
    """
    text = model.metadata_props.get(RECORD)
    if text is None:
        why = f"the model lists no slots under {RECORD!r} in its metadata"
        cure = "Give it slots: adapterkit inject MODEL.onnx A -o OUT.onnx --mode slots, or inject(..., mode='slots')"
        raise TargetNotFound(why, path=path, cure=cure)
    slots = slots_of(model)
    try:
        records = [
            SlotRecord(
                _target(each["asked"]), _target(each["target"]),
                [SlotUpdate(str(m), dict(a), dict(f)) for m, a, f in each["updates"]],
            )
            for each in json.loads(text)
        ]  # fmt: skip
        named = (name for each in records for update in each.updates for name in update.fields.values())
        missing = [name for name in named if name not in slots]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise Malformed(
            f"its list of slots is damaged ({first_line(error)})", path=path, where=RECORD, cure=_AGAIN
        ) from None
    if missing:
        raise Malformed(
            f"it lists a slot {missing[0]!r} that the graph does not have", path=path, where=RECORD, cure=_AGAIN
        )
    return records


def fixed_attributes(update: Update, fields: Collection[str]) -> dict[str, JsonValue]:
    """Return the plain values of an update that no slot holds, in the form that JSON returns them."""
    fixed = {name: value for name, value in update.attributes.items() if name not in fields}
    values: dict[str, Any] = json.loads(json.dumps(fixed))
    return values


def _baked(update: Update, fields: Mapping[str, str]) -> dict[str, JsonValue]:
    """Return the plain values that a graph's nodes fix; factors that are worked out contain them all."""
    return {} if is_worked_out(update, fields) else fixed_attributes(update, fields)


def slots_of(model: ir.Model) -> dict[str, ir.Value]:
    """Return the inputs of a graph that adapters fill, by name: the optional ones, and those of mode `inputs`."""
    held = {*model.graph.initializers, *fills_of(model.metadata_props)}
    return {value.name: value for value in model.graph.inputs if value.name is not None and value.name in held}


def fills_of(metadata: Mapping[str, str]) -> dict[str, float]:
    """Return the slots that a run has to fill, each with the number that changes nothing.

    Raises:
        Malformed: the metadata is damaged.
    """
    text = metadata.get(REQUIRED)
    if text is None:
        return {}
    try:
        return {str(name): float(fill) for name, fill in json.loads(text).items()}
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        why = f"its list of required slots is damaged ({first_line(error)})"
        raise Malformed(why, where=REQUIRED, cure=_AGAIN) from None


def sizes_of(value: ir.Value) -> tuple[list[object], np.dtype[Any]]:
    """Return the sizes of a slot, names for open ones, and its numpy dtype."""
    return list(value.shape or ()), element_type(value)


def neutral(fills: Mapping[str, float], declared: Mapping[str, tuple[Sequence[object], Any]]) -> dict[str, Array]:
    """Return tensors for required slots that leave the base as it is; open sizes are 1.

    Args:
        fills: slot -> the number that fills it; see `fills_of`.
        declared: slot -> its sizes, and its numpy dtype.
    """
    return {
        name: np.full([size if isinstance(size, int) else 1 for size in declared[name][0]], fill, declared[name][1])
        for name, fill in fills.items()
        if name in declared
    }


def _target(plain: Any) -> Target:
    path, rows = plain
    return Target(str(path), rows=None if rows is None else (int(rows[0]), int(rows[1])))


_AGAIN = "Write the model with slots again"


class Slots:
    """Adds slots to a graph: one for each tensor of an update, however many nodes call the update's module.

    Args:
        building: the model that is being changed.
        required: make them required inputs without defaults, which all run times can exchange.
    """

    def __init__(self, building: Building, required: bool = False) -> None:
        self.building, self.required = building, required
        self.fills: dict[str, float] = {}
        self.free: dict[str, int] = {}
        self.made: dict[tuple[int, int], tuple[Found, dict[str, Slot]]] = {}
        self.scalings: dict[int, Any] = {}

    def opened(self, update: Update, layer: Layer, place: Found, position: int) -> Update:
        """Return the update with slots in place of its tensors and its scaling.

        Args:
            update: the update at `place.updates[position]`.
            layer: one node that calls the module.
            place: the target. All of its nodes read the same slots.
            position: which of the target's updates it is.

        Raises:
            Unsupported: no default of its tensors leaves the base as it is, or its formula reads the model's inputs.
        """
        if isinstance(update, OutputUpdate) and update.asks:
            why = f"slots for {update.method}, whose formula asks the model's call for {', '.join(update.asks)}"
            raise Unsupported(why, where=str(place.asked), cure="Inject it as constants")
        key = self.building.keep(place), position
        if key not in self.made:
            try:
                self.made[key] = place, self._slots(update, layer, place, position)
            except Unsupported:
                if (factors := template(update, place)) is None:
                    raise
                self.made[key] = place, self._slots(factors, layer, place, position)
        return self._values(update, layer, key)

    def factored(self, update: Update, layer: Layer, place: Found, position: int) -> Update | None:
        """Return slots for what an update comes to at the base's weight, if nodes cannot express its own formula."""
        if (factors := template(update, place)) is None:
            return None
        key = self.building.keep(place), position
        self.made[key] = place, self._slots(factors, layer, place, position)
        return self._values(update, layer, key)

    def _values(self, update: Update, layer: Layer, key: tuple[int, int]) -> Update:
        """Return the update over its slots."""
        place, slots = self.made[key]
        if is_worked_out(update, dict.fromkeys(slots, "")):
            factors = template(update, place)
            assert factors is not None
            update = factors
        values = {name: Value(layer.branch, slot.shape, slot.dtype, slot.value) for name, slot in slots.items()}
        # A module may be called with several float dtypes; its slots have the dtype of the first call.
        return update.replace(**{n: v if v.dtype.kind in "iu" else v.cast(layer.dtype) for n, v in values.items()})

    def record(self) -> None:
        """List each target's slots in the model's metadata, which `fit` reads."""
        targets: dict[int, SlotRecord] = {}
        for (key, position), (place, slots) in self.made.items():
            first = SlotRecord.of(place)
            fields = {field: slot.value.name or "" for field, slot in slots.items()}
            update = place.updates[position]
            held = SlotUpdate(update.method, _baked(update, fields), fields)
            targets.setdefault(key, first).updates.append(held)
        listed = [record.plain() for record in targets.values()]
        self.building.model.metadata_props[RECORD] = json.dumps(listed, separators=(",", ":"))
        if not self.required:
            return
        # OpenVINO cannot read defaults of rank 0 and makes others constants; run times in JavaScript cannot set them.
        initializers = self.building.model.graph.initializers
        for name in self.fills:
            value = initializers.pop(name, None)
            if value is not None:
                value.const_value = None
        used = {value.name for value in self.building.model.graph.inputs}
        fills = {name: fill for name, fill in self.fills.items() if name in used}
        self.building.model.metadata_props[REQUIRED] = json.dumps(fills, separators=(",", ":"))

    def _slots(self, update: Update, layer: Layer, place: Found, position: int) -> dict[str, Slot]:
        """Return field -> slot."""
        # OpenVINO runs no Conv whose number of filters is open.
        fixed = self.required and any(issubclass(spot.kind, Conv) for spot in place.spots)
        shapes = {name: self._shape(update, name, leaf, fixed) for name, leaf in update.tensors.items()}
        dtype = layer.dtype
        # onnxruntime leaves the output of a Conv over zero channels, or of a product with an empty left matrix,
        # uninitialized.
        fixed_rank = any(issubclass(spot.kind, Conv | LeftMatMul) or spot.kind.inside for spot in place.spots)
        inner = int(self.required or fixed_rank)
        defaults = _neutral(update, shapes, place, inner, (inner,) if self.required else (0, 1))
        stem = _stem(place, position)
        made = {
            name: self._slot(f"{stem}.{name}", update.tensors[name], shapes[name], default, dtype)
            for name, default in defaults.items()
        }
        if isinstance(getattr(update, "scaling", None), float | int):
            # An update that changes two tied layers has one slot for its scaling, as for each tensor.
            number = from_numpy(np.array([update.attributes["scaling"]]))
            number = self.scalings.setdefault(self.building.keep(update), number)
            made["scaling"] = self._slot(f"{stem}.scaling", number, (1,), np.ones(1), dtype)
        return made

    def _shape(self, update: Update, name: str, leaf: Any, fixed: bool) -> tuple[int, ...]:
        """Return a tensor's shape, with numbers from FREE on for open sizes; `fixed` to leave none open."""
        if fixed:
            return tuple(leaf.shape)
        axes: Axes = update.tensor_fields()[name].metadata["axes"]
        if any(axis.startswith("*") for axis in axes.axes):
            extra = len(leaf.shape) - len(axes.axes) + 1
            at = axes.star or 0
            names = [*axes.axes[:at], *[""] * extra, *axes.axes[at + 1 :]]
        else:
            names = list(axes.axes)
        return tuple(
            self._open(axis) if axis.isidentifier() and axis not in FIXED else size
            for axis, size in zip(names, leaf.shape, strict=True)
        )

    def _open(self, axis: str) -> int:
        return self.free.setdefault(axis, OpenSize(FREE + len(self.free)))

    def _slot(self, name: str, leaf: Any, shape: tuple[int, ...], default: Array, dtype: np.dtype[Any]) -> Slot:
        names = {size: axis for axis, size in self.free.items()}
        declared = [f"{name}.{names[size]}" if size in names else size for size in shape]
        kind = dtype if as_array(leaf).dtype.kind not in "iu" else as_array(leaf).dtype
        # Updates that share a tensor, such as VeRA's projections, share its slot.
        key = self.building.keep(leaf), kind.str
        value = self.building.slot(key, name, default.astype(kind), declared)
        # A default is one number throughout; an empty one is filled with zeros as soon as it has a size.
        self.fills[value.name or ""] = float(default.flat[0]) if default.size else 0.0
        return Slot(value, shape, kind)


def _stem(place: Found, position: int) -> str:
    """Return the prefix of the names of an update's slots; a dot and the field's name follow it."""
    one = "" if len(place.updates) == 1 else f".{position}"
    return f"{place.target}{one}.{place.updates[position].method}"


def _neutral(
    update: Update, shapes: dict[str, tuple[int, ...]], place: Found, inner: int, tried: Sequence[int]
) -> dict[str, Array]:  # fmt: skip
    """Return tensors for an update with which it changes nothing, bit for bit.

    Args:
        update: the update.
        shapes: its tensors' shapes, with numbers from FREE on for open sizes.
        place: its target.
        inner: the number in place of open sizes.
        tried: such numbers, of which one has to change nothing.

    Raises:
        Unsupported: none of the candidates do that.
    """
    for fill in (0.0, 1.0):
        # Some formulas cannot handle empty tensors; for those, a single row of zeros stands for nothing.
        if any(_changes_nothing(update, _filled(update, shapes, size, fill), place) for size in tried):
            return _filled(update, shapes, inner, fill)
    why = f"no tensors of {update.method} leave the base as it is"
    raise Unsupported(why, where=str(place.asked), cure="Inject it as constants")


def _filled(update: Update, shapes: dict[str, tuple[int, ...]], inner: int, fill: float) -> dict[str, Array]:
    """Return tensors filled with one number, with `inner` for open sizes."""
    made = {}
    for name, leaf in update.tensors.items():
        kind = np.int64 if as_array(leaf).dtype.kind in "iu" else np.float64
        number = getattr(update, "neutral", {}).get(name, fill)
        made[name] = np.full([inner if size >= FREE else size for size in shapes[name]], number, dtype=kind)
    return made


def _changes_nothing(update: Update, tensors: dict[str, Array], place: Found) -> bool:
    shape = place.shape
    seen = (shape[1], shape[0], *shape[2:]) if place.turned else shape
    rows = place.target.rows
    seen = (rows[1] - rows[0], *seen[1:]) if rows else seen
    changes: dict[str, Any] = {"scaling": 1.0} if "scaling" in update.attribute_fields() else {}
    trial = update.replace(**tensors, **changes)
    try:
        if isinstance(update, OutputUpdate):
            return _same_output(trial, seen)
        # Random numbers, because a weight of zeros would hide most changes.
        W: Any = np.random.default_rng(0).normal(size=seen)
        b: Any = np.random.default_rng(1).normal(size=seen[0])
        settled = trial.settled(W) if trial.bias_sees_weight else trial
        new_W = trial.new_weight(W) if trial.changes_weight else W
        return bool((np.asarray(new_W) == W).all() and (np.asarray(settled.new_bias(b)) == b).all())
    except (ArithmeticError, AttributeError, ValueError, TypeError, IndexError, np.linalg.LinAlgError):
        return False


class _Stub:
    """A layer in numpy, to try an output update on."""

    channel = -1

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.W: Any = np.random.default_rng(0).normal(size=(shape[0], math.prod(shape[1:])))

    def __call__(self, x: object) -> Any:
        return x @ self.W.mT

    hidden = __call__

    def residual(self, x: Any) -> None:
        return None

    def norm(self, h: Any) -> Any:
        return h

    def close(self, h: Any, x: Any, whole: bool = True) -> Any:
        return h

    def mix(self, h: Any, w: Any) -> Any:
        return h @ w.mT

    def per_channel(self, v: Any) -> Any:
        return v


def _same_output(update: Update, shape: tuple[int, ...]) -> bool:
    stub = _Stub(shape)
    x = np.random.default_rng(2).normal(size=(2, 3, stub.W.shape[1]))
    return bool((update.forward(x, stub) == stub(x)).all())


# Match an adapter's tensors to the slots of a model, to feed them or to write an `.onnx_adapter` file.


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
    return _fitted(model, read, base_weights)[1]


@places_errors
def write_adapter(
    model: Model, adapter: Adapter | str | PathLike[str], out: str | PathLike[str], *, base_weights: Base | None = None,
    rename: str | Sequence[str] = (),
) -> Path:  # fmt: skip
    """Write an adapter as an `.onnx_adapter` file for the slots of a model; see `fit` for the arguments.

    onnxruntime's `LoraAdapter` and `Session` load it. A record beside it says what its values mean, so
    `adapterkit.read` can read them back. If `out` ends with `.safetensors`, the tensors are written in that format, by
    the names of the inputs, for run times that read no `.onnx_adapter` files; `Session` loads it too.
    """
    from ..formats.onnx_adapter import write_slots_record

    (read,) = renamed([loaded(adapter, base_weights)[0]], rename)
    read, feeds, names = _fitted(model, read, base_weights)
    if str(out).lower().endswith(SAFETENSORS):
        model_ir = opened(model).model
        declared = {name: sizes_of(value) for name, value in slots_of(model_ir).items()}
        return write_slot_values(neutral(fills_of(model_ir.metadata_props), declared) | feeds, out)
    write_ort_adapter(out, OrtAdapter({name: from_numpy(array) for name, array in feeds.items()}))
    if not all(names):
        return Path(out)  # Stacks and factors are for this graph alone; no record says how to read them back.
    told = {name for fields in names for name in fields.values()}
    write_slots_record(read, names, [name for name in feeds if name not in told], Path(out))
    return Path(out)


def slotted(model: Model, adapter: Adapter) -> tuple[Adapter, tuple[Target, ...]]:
    """Split an adapter into the updates that a graph has slots for, and the targets that it has none for.

    Raises:
        TargetNotFound: the graph has no slots at all.
        Malformed: its list of slots is damaged.
    """
    source = opened(model)
    slots, records = slots_of(source.model), recorded(source.model, source.path)
    parts, whole = in_parts(adapter, _rows_in(records, slots))
    known = dict.fromkeys((name.path for record in records for name in (record.asked, record.target)), ())
    try:
        missing: Collection[Target] = find_sites(parts, known, partial=True, modules=known).missing
    except TargetNotFound:  # None of them is there.
        missing = parts.updates
    lost = tuple(dict.fromkeys(whole.get(target, target) for target in missing))
    gone = set(lost)
    return adapter.replace(updates={t: own for t, own in adapter.updates.items() if t not in gone}), lost


SAFETENSORS = ".safetensors"

KIND = {"format": "adapterkit.slots"}
"""Metadata of a safetensors file with tensors for slots, by the names of inputs."""


def write_slot_values(feeds: Mapping[str, Array], out: str | PathLike[str]) -> Path:
    """Write tensors for slots as a safetensors file."""
    write_safetensors(out, {name: from_numpy(array) for name, array in feeds.items()}, KIND)
    return Path(out)


def _fitted(
    model: Model, adapter: Adapter, base: Base | None
) -> tuple[Adapter, dict[str, Array], list[dict[str, str]]]:
    """Return the adapter in the parts that the graph has, slot -> array, and for each update field -> slot."""
    source = opened(model)
    slots, records = slots_of(source.model), recorded(source.model, source.path)
    feeds: dict[str, Array] = {}
    adapter, _ = in_parts(adapter, _rows_in(records, slots))
    fill = _fill_rows if _by_rows(source.model) else _fill
    names = []
    for target, record in zip(adapter.updates, _records_of(adapter, records), strict=True):
        for update, fields in _paired(adapter.updates[target], record, target, slots):
            if is_worked_out(update, fields):
                (factors,) = worked_out(source.model, adapter, target, base)
                fill(factors, fields, target, slots, feeds)
                names.append(dict[str, str]())
            else:
                names.append(fill(update, fields, target, slots, feeds))
    return adapter, feeds, names


def _rows_in(records: list[SlotRecord], slots: dict[str, ir.Value]) -> Callable[[str], int | None]:
    """Return how many rows the target of some path has, by the slots of its LoRA or of its own outputs."""
    rows: dict[str, int | None] = {}
    for record in records:
        for update in record.updates:
            field = next((word for word in ("B", "l", "magnitude") if word in update.fields), None)
            shape = None if field is None else slots[update.fields[field]].shape
            sizes = [] if shape is None else [size for size in shape if isinstance(size, int)]
            rows[record.asked.path] = sizes[-1] if sizes else 0
    return rows.get


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
        if (fixed := _baked(update, own.fields)) != own.attributes:
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
        name = fields[field]
        array = _padded(update, field, as_array(leaf), slots[name])
        _check(name, array, slots[name], target)
        kind = slots[name].dtype
        cast = array if array.dtype.kind in "iu" or kind is None else array.astype(kind.numpy())
        if name in feeds and not np.array_equal(feeds[name], cast):
            raise Unsupported("two tensors for one slot", where=name, cure=_MADE)
        feeds[name] = cast
    return {field: fields[field] for field in update.tensors}


RANKED = ("lora", "open_factors")
"""Methods whose factors may have zeros appended along the rank."""


def _padded(update: Update, field: str, array: Array, slot: ir.Value) -> Array:
    """Return a factor of a LoRA with zeros up to a slot's fixed rank, which change nothing."""
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
    """Whether the slots of a graph are stacks of adapters."""
    from .rowwise import ROWS

    return ROWS in model.metadata_props


def _fill_rows(
    update: Update, fields: dict[str, str], target: Target, slots: dict[str, ir.Value], feeds: dict[str, Array]
) -> dict[str, str]:  # fmt: skip
    """Put an update's factors into stacked slots, as a stack of one."""
    from .rowwise import factors_of

    for field, array in factors_of(update).items():
        name = fields[field]
        _check(name, array, slots[name], target)
        kind = slots[name].dtype
        feeds[name] = array if kind is None else array.astype(kind.numpy())
    return {}


def _check(name: str, array: Array, slot: ir.Value, target: Target) -> None:
    declared = list(slot.shape or ())
    fits = len(declared) == array.ndim and all(
        not isinstance(size, int) or size == own for size, own in zip(declared, array.shape, strict=True)
    )
    if not fits:
        why = f"{list(array.shape)} for a slot of {[size if isinstance(size, int) else 'any' for size in declared]}"
        cure = "Is this adapter made for this base? A convolution's rank is fixed by --mode inputs (mode='inputs')"
        raise ShapeMismatch(why, where=f"{target}: {name}", cure=cure)


_MADE = "Give the model slots for this adapter: inject it with --mode slots, mode='slots'"
