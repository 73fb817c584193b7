"""Slots: optional graph inputs for an adapter's tensors, so that adapters can be swapped at run time.

A slot's default leaves the base unchanged. Sizes that the base does not fix, such as the rank, are dynamic. In most
defaults, a dynamic size is 0. In defaults for operators such as Conv, it is 1, because these operators do not compute
correctly with empty tensors. A scalar such as `scaling` gets a slot of shape `[1]`. The graph is built by running an
adapter's formula on the slots. During this run, each dynamic size is represented by a placeholder, a number that is too
large to be a real size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx_ir as ir

from ..core.adapter import Target
from ..core.shapes import Axes
from ..core.updates import OutputUpdate, Update
from ..errors import Malformed, TargetNotFound, Unsupported, first_line
from ..io.lazy import as_array, from_numpy
from .building import FREE, Array, Branch, Building, Dtype, element_type
from .experts import EXPERT, Experts
from .layers import Conv, GraphLayer, LeftMatMul
from .norms import computes_apart
from .open_factors import is_worked_out, template
from .resolved import ResolvedTarget
from .values import OpenSize, Value

if TYPE_CHECKING:
    import torch

    from ..core.updates.update import Layer as FormulaLayer
    from ..io.lazy import Leaf
    from ..io.strict_json import JsonValue
    from .outlets import Ended


RECORD = "adapterkit.slots"
"""Metadata key of a model. Its value is JSON that lists each target's slots."""

REQUIRED = "adapterkit.required"
"""Metadata key of a model whose slots are required inputs. Its value is JSON that maps each slot's name to a number.
The model computes the base's results if each slot is filled with its number."""

FIXED = frozenset({"out", "in", "k", "rest", "columns", "hidden", "first", "second", "outs", "ins", "shorts", "longs"})
"""Names of axes of fixed size: the base's layer determines the size, or the size is the same in all layers."""


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
        asked: the target, under its name in the adapter.
        target: the same target, under its name in the graph.
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
    """Read the list of a model's slots from the model's metadata.

    Args:
        model: a model that `inject` or `export` gave slots.
        path: the model's file, for errors.

    Raises:
        TargetNotFound: the metadata has no list of slots.
        Malformed: the list is damaged, or contains a slot that the graph does not have.
    """
    text = model.metadata_props.get(RECORD)
    if text is None:
        why = f"the model lists no slots under {RECORD!r} in its metadata"
        cure = "To add slots: adapterkit inject MODEL.onnx A -o OUT.onnx --mode slots (inject(..., mode='slots'))"
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
            f"the model's list has the slot {missing[0]!r}, but the graph has no such input",
            path=path,
            where=RECORD,
            cure=_AGAIN,
        )
    return records


def fixed_attributes(update: Update, fields: Collection[str]) -> dict[str, JsonValue]:
    """Return the attributes of an update that have no slot, as JSON values: for example, a tuple becomes a list."""
    fixed = {name: value for name, value in update.attributes.items() if name not in fields}
    values: dict[str, Any] = json.loads(json.dumps(fixed))
    return values


def baked_attributes(update: Update, fields: Mapping[str, str]) -> dict[str, JsonValue]:
    """Return the update's attributes that are constants in the graph's nodes.

    The result is empty if the slots hold computed factors, because the factors already include all attributes.
    """
    return {} if is_worked_out(update, fields) else fixed_attributes(update, fields)


def slots_of(model: ir.Model) -> dict[str, ir.Value]:
    """Return the graph inputs that adapters fill, by name: optional inputs, or required inputs (mode `inputs`)."""
    defaults = {*model.graph.initializers, *fills_of(model.metadata_props)}
    return {value.name: value for value in model.graph.inputs if value.name is not None and value.name in defaults}


def fills_of(metadata: Mapping[str, str]) -> dict[str, float]:
    """Return a map from each required slot's name to the number that fills the slot if there is no adapter.

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
    """Return a tensor for each required slot. These tensors leave the base's results unchanged.

    In the tensors, every dynamic size is 1.

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
    """Return a tensor for each of a graph's required slots. These tensors leave the base's results unchanged."""
    declared = {name: sizes_of(value) for name, value in slots_of(model).items()}
    return neutral(fills_of(model.metadata_props), declared)


def _target(plain: Any) -> Target:
    path, rows = plain
    if rows is None:
        return Target(str(path))
    start, stop = rows
    return Target(str(path), rows=(int(start), int(stop)))


_AGAIN = "Inject the adapter with --mode slots (mode='slots') again"


class Slots:
    """Adds slots to a graph, one for each tensor of an update. All nodes that call the same module share its slots.

    Args:
        building: the model that is being changed.
        required: whether to make the slots required inputs, without defaults. Every runtime can set required inputs.
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
            Unsupported: the update's formula reads the model's inputs; or the slots have no default values that leave
                the base unchanged, and factors cannot express the update.
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
        """Return an update whose tensors are slots for factors; None if factors cannot express the given update.

        `fit` later computes the factors from an adapter's update and the base's weight.
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
        # Cast slots to the layer's dtype: a slot has the dtype of the module's first call, but other calls of the same
        # module may have a different dtype.
        return update.replace(**{n: v if v.dtype.kind in "iu" else v.cast(layer.dtype) for n, v in values.items()})

    def record(self) -> None:
        """Write the list of each target's slots to the model's metadata, where `fit` reads it.

        If the slots are required inputs, also remove their defaults from the graph.
        """
        targets: dict[int, SlotRecord] = {}
        for (key, position), (place, slots) in self.slots_by_target.items():
            first = SlotRecord.of(place)
            fields = {field: slot.value.name or "" for field, slot in slots.items()}
            update = place.updates[position]
            slot_update = SlotUpdate(update.method, baked_attributes(update, fields), fields)
            targets.setdefault(key, first).updates.append(slot_update)
        listed = [record.plain() for record in targets.values()]
        self.building.model.metadata_props[RECORD] = json.dumps(listed, separators=(",", ":"))
        if not self.required:
            return
        # Remove the defaults, because some runtimes do not support them. OpenVINO cannot read an empty default (LoRA
        # rank 0), and turns an input with a non-empty default into a constant. JavaScript runtimes cannot set an input
        # that has a default.
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
        # For some layers, use size 1 instead of 0 for the dynamic axes of a default, because onnxruntime does not
        # initialize the output of some operations: a Conv over zero channels, and a matrix product whose left matrix is
        # empty.
        fixed_rank = any(issubclass(spot.kind, Conv | LeftMatMul) or spot.kind.inside for spot in place.spots)
        inner = int(self.required or fixed_rank)
        defaults = _neutral(update, shapes, place, inner, (inner,) if self.required else (0, 1))
        stem = _stem(place, position)
        slots_made = {
            name: self._slot(f"{stem}.{name}", update.tensors[name], shapes[name], default, dtype)
            for name, default in defaults.items()
        }
        if isinstance(getattr(update, "scaling", None), float | int):
            # If an update changes two tied layers, the layers share the update's slots. `_slot` returns the same slot
            # for the same tensor, but a scaling is a number. Therefore, keep one tensor for each update's scaling.
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
        # Use the tensor as the key, so that updates with a common tensor, such as a projection of VeRA, share one slot.
        key = self.building.keep(leaf), kind.str
        value = self.building.slot(key, name, default.astype(kind), declared)
        # All elements of a default are one number. Record this number, because `neutral` fills required inputs with it.
        # An empty default has no elements, so record 0.
        self.fills[value.name or ""] = float(default.flat[0]) if default.size else 0.0
        return Slot(value, shape, kind)


def _stem(place: ResolvedTarget, position: int) -> str:
    """Return the prefix of the names of an update's slots. After the prefix comes a dot and the field's name."""
    one = "" if len(place.updates) == 1 else f".{position}"
    return f"{_target_of(place)}{one}.{place.updates[position].method}"


def _target_of(place: ResolvedTarget) -> Target:
    """Return the target under its name in the graph.

    If the target is an expert, omit the rows, because the name already identifies the expert.
    """
    within = any(issubclass(spot.kind, Experts) or EXPERT in spot.node.metadata_props for spot in place.spots)
    return Target(place.target.path, rows=None if within else place.target.rows)


def _neutral(
    update: Update, shapes: dict[str, tuple[int, ...]], place: ResolvedTarget, inner: int, tried: Sequence[int]
) -> dict[str, Array]:  # fmt: skip
    """Return tensors with which an update leaves the base's results unchanged, bit for bit.

    Args:
        update: the update.
        shapes: the shapes of the tensors, with placeholders of at least `FREE` for dynamic sizes.
        place: the update's target.
        inner: the size of dynamic axes in the result.
        tried: sizes to try for dynamic axes. One size that leaves the results unchanged is enough.

    Raises:
        Unsupported: no tensors were found that leave the base's results unchanged.
    """
    for fill in (0.0, 1.0):
        # Try all sizes in `tried`, because some formulas fail with empty tensors (size 0).
        if any(_changes_nothing(update, _filled(update, shapes, size, fill), place) for size in tried):
            return _filled(update, shapes, inner, fill)
    why = f"slots need default values, but no values of {update.method}'s tensors leave the base unchanged"
    raise Unsupported(why, where=str(place.asked), cure="Inject the adapter with --mode constant (mode='constant')")


def _filled(update: Update, shapes: dict[str, tuple[int, ...]], inner: int, fill: float) -> dict[str, Array]:
    """Return a tensor for each field of an update. All elements of a returned tensor are the same number.

    The number is the field's entry in `update.neutral`, or `fill` if there is no entry. Dynamic axes have size `inner`.
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
    """A linear layer in numpy, used to check whether an output update leaves the layer's output unchanged."""

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
