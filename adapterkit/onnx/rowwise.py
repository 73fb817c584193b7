"""Add slots for a stack of adapters to a graph, and an input that selects an adapter for each row of the batch.

In one run, a server of many LoRAs can then use a different adapter for each text of a batch. Each target has two slots:
`A` of shape `[adapters, in, rank]`, and `B` of shape `[adapters, rank, out]`. `B` includes the scaling. All targets
share the input `adapter_index`, `[batch]`. By default, the slots contain one adapter of rank 0. With this adapter, the
graph's outputs equal the base's outputs bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import onnx_ir as ir

from ..errors import Unsupported
from ..io.lazy import as_array
from .building import Array, Building
from .fused_nodes import Attention
from .integer_layers import DynamicQuantizeMatMul, MatMulIntegerToFloat, QAttention, QLinearMatMul
from .layers import Gemm, MatMul
from .operands import attribute
from .packed import MatMulInteger, MatMulNBits
from .slots import RECORD, SlotRecord, SlotUpdate, fixed_attributes
from .values import Value

if TYPE_CHECKING:
    from ..core.updates import Update
    from .layers import GraphLayer
    from .outlets import Ended
    from .providers import OrtInput
    from .resolved import ResolvedTarget

INDEX = "adapter_index"
"""Name of the input that contains, for each row of the batch, the index of the row's adapter in the stack."""

ROWS = "adapterkit.rows"
"""Metadata key that only models with slots for stacked adapters have. Its value is `INDEX`."""

LARGE = 1 << 28
"""Limit in bytes for shape inference, which copies the model. Shapes are not inferred if the model's tensors, not
counting external data, are larger."""

LINEAR = (
    MatMul, Gemm, MatMulNBits, MatMulInteger, Attention, QAttention, QLinearMatMul, DynamicQuantizeMatMul,
    MatMulIntegerToFloat,
)  # fmt: skip
"""Kinds of layers whose inputs and outputs have the batch on the first axis and the channels on the last axis."""


class TargetRows(Protocol):
    """A layer, or a view of some rows of its weight.

    `x` is the layer's input in the graph. Calling the object with an input returns the output for that input.
    """

    x: Value

    def __call__(self, x: Value) -> Value: ...


class RowSlots:
    """Adds slots for a stack of adapters to a graph.

    Args:
        building: the model that is being changed.
    """

    def __init__(self, building: Building) -> None:
        self.building = building
        self.slots_by_target: dict[int, tuple[ResolvedTarget, dict[str, ir.Value]]] = {}
        default = np.zeros(1, np.int64)
        self.index = building.slot(("rows", INDEX), INDEX, default, ["batch_of_adapters"])
        self.shapes = _shapes(building.model)

    def output(self, seen: TargetRows, layer: GraphLayer | Ended, place: ResolvedTarget) -> Value:
        """Add the selected adapters' changes to a layer's output, and return the sum.

        Each row of the batch gets the change of the adapter that `adapter_index` selects for this row.

        Args:
            seen: the layer; if the target is only some rows of the layer's weight, a view of these rows.
            layer: the layer.
            place: the target.

        Raises:
            Unsupported: the target has several updates, or an update that is not a LoRA or changes a bias. Or the
                layer's kind is not in `LINEAR`, the updates apply to the transposed weight, or a norm is folded into
                the layer. Or the number of axes of the layer's input is known, and is neither two nor three. Or the
                input has two axes, and the first axis is not known to be the batch.
        """
        _check(place)
        key = self.building.keep(place)
        if key not in self.slots_by_target:
            self.slots_by_target[key] = place, self._slots(place.updates[0], layer, place)
        slots, x, branch = self.slots_by_target[key][1], layer.x, layer.branch
        shape = x.value.shape if x.value.shape is not None else self.shapes.get(x.value.name or "")
        sizes = None if shape is None else len(shape)
        flat = sizes == 2
        # A Gemm with transA reads its rows from the second axis.
        across = layer.node is not None and bool(attribute(layer.node, "transA", 0))
        known = _is_batch(x.value, shape, int(across), self.building.model)
        if (sizes is not None and sizes not in (2, 3)) or ((flat or across) and not known):
            why = (
                "--mode rows (mode='rows') needs a layer input with 3 axes, or with 2 axes of which the "
                f"{'second' if across else 'first'} is known to be the batch; the input of this layer has {sizes} axes"
            )
            raise Unsupported(why, where=str(place.asked), cure="Inject the adapter with --mode slots (mode='slots')")
        one = self.building.literal(np.array([1]))
        rows = branch.node("Transpose", [x.value], {"perm": [1, 0]}, x.dtype, None) if across else x.value
        rows = branch.node("Unsqueeze", [rows, one], None, x.dtype, None) if flat else rows
        if sizes is None:
            # The number of axes is unknown, as in the body of a Loop. Merge the axes between batch and channels.
            three = self.building.literal(np.array([0, -1, layer.shape[1]]))
            rows = branch.node("Reshape", [rows, three], None, x.dtype, None)
        for name in ("A", "B"):
            chosen = branch.node("Gather", [slots[name], self.index], {"axis": 0}, layer.dtype, None)
            rows = branch.node("MatMul", [rows, chosen], None, layer.dtype, None)
        rows = branch.node("Squeeze", [rows, one], None, layer.dtype, None) if flat else rows
        before: Value = seen(seen.x)
        if sizes is None:
            whole = branch.node("Shape", [before.value], None, np.int64, None)
            rows = branch.node("Reshape", [rows, whole], None, layer.dtype, None)
        total = branch.node("Add", [before.value, rows], None, layer.dtype, None)
        return Value(branch, before.sizes, np.dtype(layer.dtype), total)

    def _slots(self, update: Update, layer: GraphLayer | Ended, place: ResolvedTarget) -> dict[str, ir.Value]:
        stem, (out, into) = (
            f"{place.target}.{update.method}",
            (update.tensors["B"].shape[0], update.tensors["A"].shape[1]),
        )
        sizes = {"A": (into, 0), "B": (0, out)}
        slots_made = {}
        for name, (first, second) in sizes.items():
            default = np.zeros((1, first, second), layer.dtype)
            words = [f"{stem}.{name}.adapters", first or f"{stem}.{name}.r", second or f"{stem}.{name}.r"]
            slots_made[name] = self.building.slot(
                ("rows", self.building.keep(place), name), f"{stem}.{name}", default, words
            )
        return slots_made

    def record(self) -> None:
        """List each target's slots in the model's metadata, from which `fit` reads them."""
        listed = []
        for place, slots in self.slots_by_target.values():
            record, update = SlotRecord.of(place), place.updates[0]
            # The scaling has no slot of its own: the values in B's slot are already multiplied by the scaling.
            fields = {"A": slots["A"].name or "", "B": slots["B"].name or "", "scaling": slots["B"].name or ""}
            record.updates.append(SlotUpdate(update.method, fixed_attributes(update, fields), fields))
            listed.append(record.plain())
        self.building.model.metadata_props[RECORD] = json.dumps(listed, separators=(",", ":"))
        self.building.model.metadata_props[ROWS] = INDEX


def _check(place: ResolvedTarget) -> None:
    cure = "Inject the adapter with --mode slots (mode='slots'), and run the rows of each adapter as one batch"
    if len(place.updates) != 1 or place.updates[0].method != "lora" or place.updates[0].changes_bias:
        methods = ", ".join(update.method for update in place.updates)
        raise Unsupported(
            f"--mode rows (mode='rows') needs a single LoRA without a bias; this target has {methods}",
            where=str(place.asked),
            cure=cure,
        )
    if place.norm is not None or place.turned or not all(issubclass(spot.kind, LINEAR) for spot in place.spots):
        kinds = ", ".join(sorted({spot.node.op_type for spot in place.spots})) or "module"
        raise Unsupported(
            f"--mode rows (mode='rows') does not support this layer ({kinds})", where=str(place.asked), cure=cure
        )


def _shapes(model: ir.Model) -> dict[str, ir.Shape]:
    """Return a map from the name of each node's output to its inferred shape; empty if the inference fails.

    `RowSlots.output` uses these shapes for values whose shapes the exporter did not write. `RowSlots.output` must know
    an input's number of axes, because inputs with two axes and inputs with three axes need different nodes.
    """
    import onnx

    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    if sum(tensor.nbytes for tensor in tensors if not isinstance(tensor, ir.ExternalTensor)) > LARGE:
        return {}
    try:
        proto = onnx.shape_inference.infer_shapes(ir.to_proto(model))
        worked_out = ir.from_proto(proto)
    except Exception:  # ONNX's errors have no common base class.
        # Without shapes, an input with an unsupported number of axes is found only by the check that runs the graph.
        return {}
    outputs = (out for node in worked_out.graph for out in node.outputs)
    return {out.name: out.shape for out in outputs if out.name is not None and out.shape is not None}


def _is_batch(value: ir.Value, shape: ir.Shape | None, axis: int, model: ir.Model) -> bool:
    """Whether an axis of a value with two axes is the batch, rather than the tokens of all texts together.

    The first axis is the batch if the value is an input of the graph. Otherwise, both of these must hold: the axis has
    a dynamic size with a name, and an input of the graph with two or more axes has a first axis with the same name. Two
    dynamic sizes without a name may differ.
    """
    if value in model.graph.inputs:
        return axis == 0
    size = None if shape is None or len(shape) <= axis else shape[axis]
    name = None if size is None or isinstance(size, int) else size.value
    batches = (one.shape[0] for one in model.graph.inputs if one.shape is not None and len(one.shape) > 1)
    return name is not None and any(not isinstance(size, int) and size.value == name for size in batches)


def factors_of(update: Update) -> dict[str, Array]:
    """Return a LoRA's A `[1, in, r]` and B `[1, r, out]`, in float64. B includes the scaling."""
    A, B = (as_array(update.tensors[name]).astype(np.float64) for name in ("A", "B"))
    return {"A": A.T[None], "B": B.T[None] * float(getattr(update, "scaling", 1.0))}


def stacked(
    names: Sequence[str | None], loaded: Mapping[str, Mapping[str, Array]], slots: Mapping[str, OrtInput]
) -> dict[str, Array]:  # fmt: skip
    """Return the values of the slots and of `adapter_index` for a batch.

    If the adapters have different ranks, their factors are padded with zeros to the largest rank.

    Args:
        names: the name of each row's adapter; None for rows that use the base alone.
        loaded: the adapters' factors, by adapter name and then by slot. The first axis of each factor has size 1.
        slots: all slots by name, with their declared shapes.
    """
    order = list(dict.fromkeys(names))
    feeds: dict[str, Array] = {INDEX: np.array([order.index(name) for name in names], np.int64)}
    loaded_in_order = [loaded[name] if name is not None else {} for name in order]
    for slot in dict.fromkeys(slot for one in loaded_in_order for slot in one):
        parts = [one.get(slot) for one in loaded_in_order]
        sample = next(part for part in parts if part is not None)
        open_axis = next(axis for axis in (1, 2) if not isinstance(slots[slot].shape[axis], int))
        most = max(part.shape[open_axis] for part in parts if part is not None)
        shape = [len(parts), *sample.shape[1:]]
        shape[open_axis] = most
        whole = np.zeros(shape, sample.dtype)
        for at, part in enumerate(parts):
            if part is not None:
                whole[at][tuple(slice(size) for size in part.shape[1:])] = part[0]
        feeds[slot] = whole
    return feeds
