"""Slots: optional graph inputs for an adapter's tensors, so that adapters can be swapped at run time.

A slot's default leaves the base unchanged. Inner sizes such as the rank are dynamic. In the default, they are 0, or 1
for operators such as Conv that do not compute correctly with empty tensors. Scalars such as `scaling` are slots of
shape `[1]`. The graph is built by running an adapter's formula on the slots. During this run, each dynamic size is
represented by a placeholder that is too large to be a real size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx_ir as ir

from ..core.adapter import Adapter, Target
from ..core.shapes import Axes
from ..core.updates import OutputUpdate, Update
from ..errors import Malformed, ShapeMismatch, TargetNotFound, Unsupported, first_line, nearest, places_errors
from ..io.checkpoint import opened as opened_base
from ..io.lazy import as_array, from_numpy
from ..io.ort_adapter import OrtAdapter, write_ort_adapter
from ..io.safetensors import write as write_safetensors
from ..naming.binding import find_sites, renamed
from .building import FREE, Array, Branch, Building, Dtype, element_type
from .experts import EXPERT, Experts
from .heads import in_parts
from .layers import Conv, GraphLayer, LeftMatMul
from .model_file import GraphSource, opened
from .norms import computes_apart
from .open_factors import is_worked_out, template, worked_out
from .reading import known_config, loaded
from .resolved import ResolvedTarget
from .routed import by_expert
from .values import OpenSize, Value

if TYPE_CHECKING:
    import torch

    from ..core.updates.update import Layer as FormulaLayer
    from ..io.lazy import Leaf
    from ..io.strict_json import JsonValue
    from .outlets import Ended
    from .reading import Base, Model


RECORD = "adapterkit.slots"
"""Metadata key of a model. Its value is JSON that lists each target's slots."""

REQUIRED = "adapterkit.required"
"""Metadata key of a model whose slots are required inputs. The key's value is JSON that maps each slot's name to a
number. A slot that is filled with its number changes nothing."""

FIXED = frozenset({"out", "in", "k", "rest", "columns", "hidden", "first", "second", "outs", "ins", "shorts", "longs"})
"""Names of axes whose size is fixed: the size comes from the base's layer, or is equal in all layers."""


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """One overridable input of the graph.

    Attributes:
        value: the input; it is also an initializer of the graph.
        shape: the sizes of the slot; a size of at least `FREE` is a placeholder for a dynamic size.
        dtype: the dtype of the slot.
    """

    value: ir.Value
    shape: tuple[int, ...]
    dtype: Dtype


@dataclass(frozen=True, slots=True)
class SlotUpdate:
    """The slots of one update.

    Attributes:
        method: the update's method.
        attributes: the update's attributes that are constants in the graph's nodes.
        fields: a map from each of the update's fields to the name of the field's slot.
    """

    method: str
    attributes: dict[str, Any]
    fields: dict[str, str]


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """The slots of one target.

    Attributes:
        asked: the target, with its name in the adapter.
        target: the target, with its name in the graph.
        updates: the slots of each of the target's updates, in order.
    """

    asked: Target
    target: Target
    updates: list[SlotUpdate]

    @classmethod
    def of(cls, place: ResolvedTarget) -> SlotRecord:
        """Return a new record for a target; it lists no slots yet."""
        return cls(Target(place.asked.path, rows=place.asked.rows), _target_of(place), [])

    def plain(self) -> dict[str, JsonValue]:
        """Return the record as JSON values."""
        return {
            "asked": [self.asked.path, self.asked.rows], "target": [self.target.path, self.target.rows],
            "updates": [[each.method, each.attributes, each.fields] for each in self.updates],
        }  # fmt: skip


def recorded(model: ir.Model, path: Path | None) -> list[SlotRecord]:
    """Read the list of a model's slots.

    Args:
        model: a model that `inject` or `export` gave slots.
        path: the model's file, for errors.

    Raises:
        TargetNotFound: the model has no slots that this version can read.
        Malformed: the list is damaged, or names a slot that the graph does not have.
    """
    text = model.metadata_props.get(RECORD)
    if text is None:
        why = f"the model lists no slots under {RECORD!r} in its metadata"
        cure = "Give it slots: adapterkit inject MODEL.onnx A -o OUT.onnx --mode slots (inject(..., mode='slots'))"
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
            f"the model's list of slots is damaged ({first_line(error)})", path=path, where=RECORD, cure=_AGAIN
        ) from None
    if missing:
        raise Malformed(
            f"the model lists a slot {missing[0]!r} that the graph does not have", path=path, where=RECORD, cure=_AGAIN
        )
    return records


def fixed_attributes(update: Update, fields: Collection[str]) -> dict[str, JsonValue]:
    """Return the attributes of an update that have no slot, as values that JSON stores without change."""
    fixed = {name: value for name, value in update.attributes.items() if name not in fields}
    values: dict[str, Any] = json.loads(json.dumps(fixed))
    return values


def _baked(update: Update, fields: Mapping[str, str]) -> dict[str, JsonValue]:
    """Return the update's attributes that are constants in the graph's nodes.

    There are none if the slots hold computed factors, because these factors already include all attributes.
    """
    return {} if is_worked_out(update, fields) else fixed_attributes(update, fields)


def slots_of(model: ir.Model) -> dict[str, ir.Value]:
    """Return the graph inputs that adapters fill, by name: optional inputs, or required inputs (mode `inputs`)."""
    defaults = {*model.graph.initializers, *fills_of(model.metadata_props)}
    return {value.name: value for value in model.graph.inputs if value.name is not None and value.name in defaults}


def fills_of(metadata: Mapping[str, str]) -> dict[str, float]:
    """Return a map from each slot that every run must fill to the number that fills the slot if there is no adapter.

    Raises:
        Malformed: the metadata is damaged.
    """
    text = metadata.get(REQUIRED)
    if text is None:
        return {}
    try:
        return {str(name): float(fill) for name, fill in json.loads(text).items()}
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        why = f"the model's list of required slots is damaged ({first_line(error)})"
        raise Malformed(why, where=REQUIRED, cure=_AGAIN) from None


def sizes_of(value: ir.Value) -> tuple[list[object], Dtype]:
    """Return the sizes of a slot and its numpy dtype; a dynamic size is given by its name."""
    return list(value.shape or ()), element_type(value)


def neutral(fills: Mapping[str, float], declared: Mapping[str, tuple[Sequence[object], Dtype]]) -> dict[str, Array]:
    """Return tensors for required slots that leave the base's results unchanged; every dynamic size is 1.

    Args:
        fills: a map from each slot to the number that fills the slot; see `fills_of`.
        declared: a map from each slot to its sizes and its numpy dtype.
    """
    return {
        name: np.full([size if isinstance(size, int) else 1 for size in declared[name][0]], fill, declared[name][1])
        for name, fill in fills.items()
        if name in declared
    }


def neutral_of(model: ir.Model) -> dict[str, Array]:
    """Return tensors for a graph's required slots that leave the base's results unchanged."""
    declared = {name: sizes_of(value) for name, value in slots_of(model).items()}
    return neutral(fills_of(model.metadata_props), declared)


def _target(plain: Any) -> Target:
    path, rows = plain
    return Target(str(path), rows=None if rows is None else (int(rows[0]), int(rows[1])))


_AGAIN = "Write the model with slots again"


class Slots:
    """Adds slots to a graph, one for each tensor of an update. All nodes that call the same module share its slots.

    Args:
        building: the model that is being changed.
        required: whether to make the slots required inputs, without defaults. Every runtime can set such inputs.
    """

    def __init__(self, building: Building, required: bool = False) -> None:
        self.building, self.required = building, required
        self.fills: dict[str, float] = {}
        self.free: dict[str, int] = {}
        self.slots_by_target: dict[tuple[int, int], tuple[ResolvedTarget, dict[str, Slot]]] = {}
        self.scalings: dict[int, Leaf] = {}

    def opened(self, update: Update, layer: GraphLayer | Ended, place: ResolvedTarget, position: int) -> Update:
        """Return the update with slots in place of its tensors and its scaling.

        Args:
            update: the update at `place.updates[position]`.
            layer: the layer at one of the nodes that call the target's module.
            place: the target; all of its nodes read the same slots.
            position: the position of the update among the target's updates.

        Raises:
            Unsupported: the update has no neutral tensors, which leave the base unchanged; or the update's formula
                reads the model's inputs.
        """
        if isinstance(update, OutputUpdate) and update.asks:
            why = f"{update.method} cannot have slots: its formula reads the model's inputs {', '.join(update.asks)}"
            raise Unsupported(
                why, where=str(place.asked), cure="Inject the adapter with --mode constant (mode='constant')"
            )
        key = self.building.keep(place), position
        if key not in self.slots_by_target:
            try:
                self.slots_by_target[key] = place, self._slots(update, layer, place, position)
            except Unsupported:
                if (factors := template(update, place)) is None:
                    raise
                self.slots_by_target[key] = place, self._slots(factors, layer, place, position)
        return self._values(update, layer, key)

    def factored(
        self, update: Update, layer: GraphLayer | Ended, place: ResolvedTarget, position: int
    ) -> Update | None:
        """Return an update whose slots hold factors; None if factors cannot express the given update.

        `fit` computes the factors from the given update and the base's weight.
        """
        if (factors := template(update, place)) is None:
            return None
        key = self.building.keep(place), position
        self.slots_by_target[key] = place, self._slots(factors, layer, place, position)
        return self._values(update, layer, key)

    def stacked(
        self, place: ResolvedTarget, branch: Branch, sizes: tuple[int, int, int], dtype: Dtype
    ) -> dict[str, Value]:  # fmt: skip
        """Return the slots of a stack of experts: the factors A, B and s of the stack's change; see selected.py.

        Args:
            place: the target.
            branch: collects the nodes that read the slots.
            sizes: the numbers of experts, of outputs and of inputs.
            dtype: the dtype of the stack.

        Raises:
            Unsupported: the target has several updates, whose factors may depend on each other.
        """
        key = self.building.keep(place), 0
        if len(place.updates) > 1:
            methods = ", ".join(update.method for update in place.updates)
            why = f"the updates of one stack of experts ({methods}) cannot share slots"
            raise Unsupported(
                why, where=str(place.asked), cure="Inject the adapter with --mode constant (mode='constant')"
            )
        if key not in self.slots_by_target:
            (experts, out, into), rank = sizes, self._open("r")
            shapes = {"A": (experts, rank, into), "B": (experts, out, rank), "s": (experts, out)}
            defaults = {name: np.full([1 if n >= FREE else n for n in shape], float(name == "s"))
                        for name, shape in shapes.items()}  # fmt: skip
            self.slots_by_target[key] = (
                place,
                {
                    name: self._slot(f"{_stem(place, 0)}.{name}", from_numpy(default), shapes[name], default, dtype)
                    for name, default in defaults.items()
                },
            )
        slots = self.slots_by_target[key][1]
        values = {name: Value(branch, slot.shape, slot.dtype, slot.value) for name, slot in slots.items()}
        return {name: value.cast(dtype) for name, value in values.items()}

    def _values(self, update: Update, layer: GraphLayer | Ended, key: tuple[int, int]) -> Update:
        """Return the update with its slots in place of its tensors."""
        place, slots = self.slots_by_target[key]
        if is_worked_out(update, dict.fromkeys(slots, "")):
            factors = template(update, place)
            assert factors is not None
            update = factors.replace(adds_more=computes_apart(layer, place))
        values = {name: Value(layer.branch, slot.shape, slot.dtype, slot.value) for name, slot in slots.items()}
        # Cast slots to the layer's dtype: a slot has the dtype of the module's first call, and the module's other calls
        # may have another dtype.
        return update.replace(**{n: v if v.dtype.kind in "iu" else v.cast(layer.dtype) for n, v in values.items()})

    def record(self) -> None:
        """List each target's slots in the model's metadata, which `fit` reads."""
        targets: dict[int, SlotRecord] = {}
        for (key, position), (place, slots) in self.slots_by_target.items():
            first = SlotRecord.of(place)
            fields = {field: slot.value.name or "" for field, slot in slots.items()}
            update = place.updates[position]
            slot_update = SlotUpdate(update.method, _baked(update, fields), fields)
            targets.setdefault(key, first).updates.append(slot_update)
        listed = [record.plain() for record in targets.values()]
        self.building.model.metadata_props[RECORD] = json.dumps(listed, separators=(",", ":"))
        if not self.required:
            return
        # Remove the defaults. OpenVINO cannot read empty defaults (LoRA rank 0), and turns other inputs with a default
        # into constants. Runtimes in JavaScript cannot set inputs with a default.
        initializers = self.building.model.graph.initializers
        for name in self.fills:
            value = initializers.pop(name, None)
            if value is not None:
                value.const_value = None
        used = {value.name for value in self.building.model.graph.inputs}
        fills = {name: fill for name, fill in self.fills.items() if name in used}
        self.building.model.metadata_props[REQUIRED] = json.dumps(fills, separators=(",", ":"))

    def _slots(
        self, update: Update, layer: GraphLayer | Ended, place: ResolvedTarget, position: int
    ) -> dict[str, Slot]:
        """Return a map from each field of the update to its slot."""
        # Fix the shapes for a Conv, because OpenVINO does not run a Conv with a dynamic number of filters.
        fixed = self.required and any(issubclass(spot.kind, Conv) for spot in place.spots)
        shapes = {name: self._shape(update, name, leaf, fixed) for name, leaf in update.tensors.items()}
        dtype = layer.dtype
        # Use size 1 for dynamic sizes of these layers: onnxruntime does not initialize the output of a Conv over zero
        # channels, or of a product with an empty left matrix.
        fixed_rank = any(issubclass(spot.kind, Conv | LeftMatMul) or spot.kind.inside for spot in place.spots)
        inner = int(self.required or fixed_rank)
        defaults = _neutral(update, shapes, place, inner, (inner,) if self.required else (0, 1))
        stem = _stem(place, position)
        slots_made = {
            name: self._slot(f"{stem}.{name}", update.tensors[name], shapes[name], default, dtype)
            for name, default in defaults.items()
        }
        if isinstance(getattr(update, "scaling", None), float | int):
            # If an update changes two tied layers, both layers share one slot for the scaling, as for each tensor.
            number = from_numpy(np.array([update.attributes["scaling"]]))
            shared = self.scalings.setdefault(self.building.keep(update), number)
            slots_made["scaling"] = self._slot(f"{stem}.scaling", shared, (1,), np.ones(1), dtype)
        return slots_made

    def _shape(self, update: Update, name: str, leaf: Leaf, fixed: bool) -> tuple[int, ...]:
        """Return the shape of a tensor's slot. Placeholders of at least `FREE` stand for dynamic sizes.

        If `fixed`, no size is dynamic.
        """
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

    def _slot(self, name: str, leaf: Leaf, shape: tuple[int, ...], default: Array, dtype: Dtype) -> Slot:
        names = {size: axis for axis, size in self.free.items()}
        declared = [f"{name}.{names[size]}" if size in names else size for size in shape]
        kind = dtype if as_array(leaf).dtype.kind not in "iu" else as_array(leaf).dtype
        # Use the tensor as key: updates that share a tensor, such as VeRA's projections, share its slot.
        key = self.building.keep(leaf), kind.str
        value = self.building.slot(key, name, default.astype(kind), declared)
        # Record the number that fills the default. `neutral` fills a required input with it. An empty default has no
        # such number, so record 0.
        self.fills[value.name or ""] = float(default.flat[0]) if default.size else 0.0
        return Slot(value, shape, kind)


def _stem(place: ResolvedTarget, position: int) -> str:
    """Return the prefix of an update's slots: a slot is named by this prefix, a dot and the field's name."""
    one = "" if len(place.updates) == 1 else f".{position}"
    return f"{_target_of(place)}{one}.{place.updates[position].method}"


def _target_of(place: ResolvedTarget) -> Target:
    """Return the target, with its name in the graph. Omit the rows of an expert, because its name shows them."""
    within = any(issubclass(spot.kind, Experts) or EXPERT in spot.node.metadata_props for spot in place.spots)
    return Target(place.target.path, rows=None if within else place.target.rows)


def _neutral(
    update: Update, shapes: dict[str, tuple[int, ...]], place: ResolvedTarget, inner: int, tried: Sequence[int]
) -> dict[str, Array]:  # fmt: skip
    """Return tensors for an update that leave the base's results unchanged, bit for bit.

    Args:
        update: the update.
        shapes: the shapes of the tensors, with placeholders of at least `FREE` for dynamic sizes.
        place: the update's target.
        inner: the size of dynamic axes in the result.
        tried: sizes of dynamic axes to try. With at least one of these sizes, the tensors must change nothing.

    Raises:
        Unsupported: there are no such tensors.
    """
    for fill in (0.0, 1.0):
        # Try size 1 as well, because some formulas cannot handle empty tensors.
        if any(_changes_nothing(update, _filled(update, shapes, size, fill), place) for size in tried):
            return _filled(update, shapes, inner, fill)
    why = f"slots need default values, but no values of {update.method}'s tensors leave the base unchanged"
    raise Unsupported(why, where=str(place.asked), cure="Inject the adapter with --mode constant (mode='constant')")


def _filled(update: Update, shapes: dict[str, tuple[int, ...]], inner: int, fill: float) -> dict[str, Array]:
    """Return tensors that are filled with the update's neutral numbers, or else with `fill`.

    Dynamic axes have size `inner`.
    """
    arrays_by_name = {}
    for name, leaf in update.tensors.items():
        kind = np.int64 if as_array(leaf).dtype.kind in "iu" else np.float64
        number = getattr(update, "neutral", {}).get(name, fill)
        arrays_by_name[name] = np.full([inner if size >= FREE else size for size in shapes[name]], number, dtype=kind)
    return arrays_by_name


def _changes_nothing(update: Update, tensors: dict[str, Array], place: ResolvedTarget) -> bool:
    shape = place.shape
    seen = (shape[1], shape[0], *shape[2:]) if place.turned else shape
    rows = place.target.rows
    seen = (rows[1] - rows[0], *seen[1:]) if rows else seen
    changes: dict[str, Any] = {"scaling": 1.0} if "scaling" in update.attribute_fields() else {}
    trial = update.replace(**tensors, **changes)
    try:
        if isinstance(update, OutputUpdate):
            return _same_output(trial, seen)
        # Use random numbers, because a weight of zeros would hide most changes.
        W: Any = np.random.default_rng(0).normal(size=seen)
        b: Any = np.random.default_rng(1).normal(size=seen[0])
        settled = trial.settled(W) if trial.bias_sees_weight else trial
        new_W = trial.new_weight(W) if trial.changes_weight else W
        return bool((np.asarray(new_W) == W).all() and (np.asarray(settled.new_bias(b)) == b).all())
    except (ArithmeticError, AttributeError, ValueError, TypeError, IndexError, np.linalg.LinAlgError):
        return False


class _Stub:
    """A linear layer in numpy, on which the formula of an output update is tried."""

    channel = -1

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.W: Array = np.random.default_rng(0).normal(size=(shape[0], math.prod(shape[1:])))

    def __call__(self, x: Array) -> Array:
        y: Array = x @ self.W.mT
        return y

    hidden = __call__

    def residual(self, x: Array) -> None:
        return None

    def norm(self, h: Array) -> Array:
        return h

    def close(self, h: Array, x: Array, whole: bool = True) -> Array:
        return h

    def mix(self, h: Array, w: Array) -> Array:
        y: Array = h @ w.mT
        return y

    def per_channel(self, v: Array) -> Array:
        return v


def _same_output(update: Update, shape: tuple[int, ...]) -> bool:
    stub = _Stub(shape)
    x = np.random.default_rng(2).normal(size=(2, 3, stub.W.shape[1]))
    y = update.forward(*cast("tuple[torch.Tensor, FormulaLayer]", (x, stub)))
    return np.array_equal(cast("Array", y), stub(x))


# Match an adapter's tensors with the slots of a model, to feed them or to write an `.onnx_adapter` file.


@places_errors
def fit(
    model: Model, adapter: Adapter | str | PathLike[str], *, base_weights: Base | None = None,
    rename: str | Sequence[str] = (),
) -> dict[str, Array]:  # fmt: skip
    """Match an adapter's tensors with a model's slots, and return the values to feed to the slots.

    Args:
        model: an ONNX file or in-memory model to which `inject` or `export` gave slots.
        adapter: the adapter, or its path. It may have any rank that the slots' shapes allow, and any subset of the
            targets with slots.
        base_weights: the base's weights, for adapter files whose values depend on them.
        rename: rules for names that cannot be resolved, as in `adapterkit.merge`.

    Returns:
        A map from each slot's name to an array, in the slot's dtype.

    Raises:
        TargetNotFound: the model has no slots for a target, or the slots of a target are for another method.
        ShapeMismatch: a tensor does not fit its slot.
        Unsupported: two different tensors have the same slot; or an attribute that has no slot differs from the
            constant in the model's nodes.
        Malformed: the model's list of slots is damaged.
    """
    (read,) = renamed([loaded(adapter, base_weights)[0]], rename)
    return _fitted(model, read, base_weights)[1]


@places_errors
def write_adapter(
    model: Model, adapter: Adapter | str | PathLike[str], out: str | PathLike[str], *, base_weights: Base | None = None,
    rename: str | Sequence[str] = (),
) -> Path:  # fmt: skip
    """Write an adapter as an `.onnx_adapter` file that fills the slots of a model; see `fit` for the arguments.

    onnxruntime's `LoraAdapter` and `Session` load the file. A second file beside it describes the tensors, so that
    `adapterkit.read` can read them back. If `out` ends with `.safetensors`, the tensors are written in that format,
    under the names of the slots, for runtimes that do not read `.onnx_adapter` files; `Session` also loads such a
    file. If the slots are required inputs, the adapter may not fill all of them. For each other slot, the file then has
    a tensor that changes nothing.
    """
    from ..formats.onnx_adapter import write_slots_record

    (read,) = renamed([loaded(adapter, base_weights)[0]], rename)
    read, feeds, names = _fitted(model, read, base_weights)
    feeds = neutral_of(opened(model).model) | feeds
    write_slot_values(feeds, out)
    if str(out).lower().endswith(SAFETENSORS) or not all(names):
        return Path(out)  # Values of stacks, experts and computed factors cannot be read back.
    named = {name for fields in names for name in fields.values()}
    write_slots_record(read, names, [name for name in feeds if name not in named], Path(out))
    return Path(out)


def slotted(model: Model, adapter: Adapter) -> tuple[Adapter, tuple[Target, ...]]:
    """Return the part of an adapter that a graph has slots for, and the adapter's targets that have no slots.

    Raises:
        TargetNotFound: the graph has no slots at all.
        Malformed: the graph's list of slots is damaged.
    """
    source = opened(model)
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
"""Metadata of a safetensors file with tensors for slots."""


def write_slot_values(feeds: Mapping[str, Array], out: str | PathLike[str]) -> None:
    """Write tensors for slots: as safetensors if `out` ends with `.safetensors`, else as an `.onnx_adapter` file."""
    tensors = {name: from_numpy(array) for name, array in feeds.items()}
    if str(out).lower().endswith(SAFETENSORS):
        write_safetensors(out, tensors, KIND)
    else:
        write_ort_adapter(out, OrtAdapter(tensors))


def _fitted(
    model: Model, adapter: Adapter, base: Base | None
) -> tuple[Adapter, dict[str, Array], list[dict[str, str]]]:
    """Match an adapter's tensors with the slots of a graph.

    Returns:
        the adapter, with its updates split like the graph's layers; a map from slots to arrays;
        and for each update, a map from its fields to slots.
    """
    source = opened(model)
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
    return adapter, feeds, names


def _as_stored(
    adapter: Adapter, source: GraphSource, records: list[SlotRecord], base: Base | None
) -> tuple[Adapter, dict[Target, Target], Collection[Target]]:
    """Split updates of fused layers and of stacks of experts into the parts that have separate slots.

    Returns:
        the adapter with split updates; a map from each part's target to the target that was split; the targets that are
        experts in a node.
    """
    config = known_config(None if base is None else opened_base(base), source.path)
    adapter, experts = by_expert(adapter, source.model, config)
    adapter, whole = in_parts(adapter, _rows_in(records, slots_of(source.model)))
    return adapter, whole | experts, experts.keys()


def _rows_in(records: list[SlotRecord], slots: dict[str, ir.Value]) -> Callable[[str], int | None]:
    """Return a function that takes a target's path, and returns the target's number of rows.

    The number of rows is read from the shape of a slot; it is 0 if the shape does not show it. The function returns
    None for a path without slots.
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
    """Return a list with one record of slots for each of the adapter's targets, in order.

    Raises:
        TargetNotFound: a target has no slots; the error gives the nearest name that has slots.
    """
    known: dict[str, list[tuple[Target, SlotRecord]]] = {}
    for record in records:
        for name in {record.asked, record.target}:
            known.setdefault(name.path, []).append((name, record))
    try:
        sites = find_sites(adapter, dict.fromkeys(known, ()), partial=False, modules=known).sites
    except TargetNotFound as error:
        cure = f"{error.cure}. Give the model slots for this adapter: inject it with --mode slots (mode='slots')"
        raise TargetNotFound("the model has no slots for this target", where=error.where, cure=cure) from None
    return [
        _record_at(site.target, known[site.target.path], asked)
        for site, asked in zip(sites, adapter.updates, strict=True)
    ]


def _record_at(target: Target, records: list[tuple[Target, SlotRecord]], asked: Target) -> SlotRecord:
    """Return the record of a target. Each part of a fused weight has a separate record, which is found by its rows."""
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
    """Pair each of a target's updates with its slots.

    Some updates of the record may be missing, but the others must be in the record's order.
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
        if (fixed := _baked(update, slot_update.fields)) != slot_update.attributes:
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
    """Add an update's tensors to `feeds`, under the names of their slots; return a map from fields to slots."""
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
        kind = slots[name].dtype
        cast = array if array.dtype.kind in "iu" or kind is None else array.astype(kind.numpy())
        if name in feeds and not np.array_equal(feeds[name], cast):
            raise Unsupported("two tensors with different values have the same slot", where=name, cure=_INJECT_SLOTS)
        feeds[name] = cast
    return {field: fields[field] for field in update.tensors}


RANKED = ("lora", "open_factors")
"""Methods whose factors may be padded with zeros along the rank."""


def _padded(update: Update, field: str, array: Array, slot: ir.Value) -> Array:
    """Pad a factor with zeros to the rank of its slot, if this rank is fixed. The zeros change no result."""
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
    """Add an update's factors to `feeds`, as a stack of one adapter; used if the slots hold stacks of adapters."""
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


_INJECT_SLOTS = "Give the model slots for this adapter: inject it with --mode slots (mode='slots')"
