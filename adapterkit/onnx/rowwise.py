"""Add slots for a stack of adapters to a graph, and an input that selects an adapter for each row of the batch.

One run can then serve texts with different adapters, as servers of many LoRAs need. Each target has two slots: `A`,
`[adapters, in, rank]`, and `B`, `[adapters, rank, out]`. `B` includes the scaling. All targets share the input
`adapter_index`, `[batch]`. By default, the slots contain one adapter of rank 0. With this adapter, the graph's
results equal the base's bit for bit.
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
from .integer_layers import DynamicQuantizeMatMul, MatMulIntegerToFloat, QAttention, QLinearMatMul
from .layers import Attention, Gemm, MatMul
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
"""Shapes are not inferred if a model's tensors, without external data, have more bytes than this, because inference
copies the model."""

LINEAR = (
    MatMul, Gemm, MatMulNBits, MatMulInteger, Attention, QAttention, QLinearMatMul, DynamicQuantizeMatMul,
    MatMulIntegerToFloat,
)  # fmt: skip
"""Kinds of layers whose inputs and outputs have the batch on the first axis and the channels on the last axis."""


class TargetRows(Protocol):
    """A layer, or a view of some rows of the layer's weight: its input `x`, and a call that returns its output."""

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
        """Return a layer's output, to which the change by each row's adapter is added.

        Args:
            seen: the layer, or a view of the rows of the layer's weight that the target consists of.
            layer: the layer.
            place: the target.

        Raises:
            Unsupported: the target's update is not a single LoRA without a bias, the layer is of another kind than
                `LINEAR`, or the first axis of the layer's input is not the batch.
        """
        _check(place)
        key = self.building.keep(place)
        if key not in self.slots_by_target:
            self.slots_by_target[key] = place, self._slots(place.updates[0], layer, place)
        slots, x, branch = self.slots_by_target[key][1], layer.x, layer.branch
        shape = x.value.shape if x.value.shape is not None else self.shapes.get(x.value.name or "")
        sizes = None if shape is None else len(shape)
        flat = sizes == 2
        if (sizes is not None and sizes not in (2, 3)) or (flat and not _is_batch(shape, self.building.model)):
            why = (
                f"the rows of a batch cannot have different adapters here: the layer's input has {sizes} axes, and its "
                "first axis is not known to be the batch"
            )
            raise Unsupported(why, where=str(place.asked), cure="Inject the adapter with --mode slots (mode='slots')")
        one = self.building.literal(np.array([1]))
        rows = branch.node("Unsqueeze", [x.value, one], None, x.dtype, None) if flat else x.value
        for name in ("A", "B"):
            chosen = branch.node("Gather", [slots[name], self.index], {"axis": 0}, layer.dtype, None)
            rows = branch.node("MatMul", [rows, chosen], None, layer.dtype, None)
        rows = branch.node("Squeeze", [rows, one], None, layer.dtype, None) if flat else rows
        before: Value = seen(seen.x)
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
            # B includes the scaling, so the slot for the scaling is the slot for B.
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
            f"rows of a batch cannot have different adapters of {methods}", where=str(place.asked), cure=cure
        )
    if place.norm is not None or place.turned or not all(issubclass(spot.kind, LINEAR) for spot in place.spots):
        kinds = ", ".join(sorted({spot.node.op_type for spot in place.spots})) or "module"
        raise Unsupported(
            f"rows of a batch cannot have different adapters at a {kinds}", where=str(place.asked), cure=cure
        )


def _shapes(model: ir.Model) -> dict[str, ir.Shape]:
    """Infer the shapes of all nodes' outputs; return a map from names to shapes, empty if the inference fails.

    `RowSlots.output` uses these shapes for values whose shapes the exporter did not write. It must know the number of
    axes, because a matrix and a stack of matrices need different nodes.
    """
    import onnx

    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    if sum(tensor.nbytes for tensor in tensors if not isinstance(tensor, ir.ExternalTensor)) > LARGE:
        return {}
    try:
        proto = onnx.shape_inference.infer_shapes(ir.to_proto(model))
        worked_out = ir.from_proto(proto)
    except Exception:  # ONNX's errors have no common base class. Without shapes, only the later check finds bad axes.
        return {}
    outputs = (out for node in worked_out.graph for out in node.outputs)
    return {out.name: out.shape for out in outputs if out.name is not None and out.shape is not None}


def _is_batch(shape: ir.Shape | None, model: ir.Model) -> bool:
    """Whether the first axis of a matrix is the batch, rather than one axis for the tokens of all texts.

    It is the batch if an input of the graph has the same dynamic size on its first axis.
    """
    first = None if shape is None else shape[0]
    batches = [one.shape[0] for one in model.graph.inputs if one.shape is not None and len(one.shape) > 1]
    return first is not None and not isinstance(first, int) and any(str(one) == str(first) for one in batches)


def factors_of(update: Update) -> dict[str, Array]:
    """Return a LoRA's A and B, with the scaling in B, as a stack of one adapter in the slots' layout, float64."""
    A, B = (as_array(update.tensors[name]).astype(np.float64) for name in ("A", "B"))
    return {"A": A.T[None], "B": B.T[None] * float(getattr(update, "scaling", 1.0))}


def stacked(
    names: Sequence[str | None], loaded: Mapping[str, Mapping[str, Array]], slots: Mapping[str, OrtInput]
) -> dict[str, Array]:  # fmt: skip
    """Return the values of the slots and of `adapter_index` for a batch; zeros pad factors to the largest rank.

    Args:
        names: the name of each row's adapter; None for rows that use the base alone.
        loaded: a map from each adapter's name to the adapter's factors by slot, as stacks of one adapter.
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
