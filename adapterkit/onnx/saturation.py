"""Count values that static quantization clips because its ranges were calibrated without the adapter.

A QuantizeLinear with a stored scale has a fixed range. If a layer's values become larger with the adapter, the node
clips them, and nothing in the graph shows the clipping. So this module runs the graph without and with the adapter,
and counts the clipped values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from .building import Array
from .model_file import inline
from .operands import attribute, is_constant, numbers
from .widening import started

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue

CURE = (
    "The ranges were calibrated without the adapter: merge the adapter into the floating-point model, and quantize "
    "the merged model with the same calibration data"
)


MOST_MOVED, TIMES = 0.01, 3.0
"""Limits for how much rounding and clipping change the graph's outputs. The user gets a warning if the change with the
adapter exceeds both `MOST_MOVED` times the largest output value and `TIMES` times the change without the adapter.
The limits are used only if no node clips more values with the adapter than without it."""


@dataclass(frozen=True, slots=True)
class Saturation:
    """The numbers of values that quantization clips without and with the adapter.

    Attributes:
        nodes: a map from the name of each QuantizeLinear that clips values to two counts. The first is the number of
            values that the node clips without the adapter. The second is the number that it clips with the adapter.
        values: the number of values that the QuantizeLinear nodes read in the graph with the adapter, clipped or not.
        moved: the change of the outputs that is caused by rounding and clipping activations, relative to the largest
            output value. The first element is the change without the adapter, the second the change with the adapter.
            None if the graph cannot be run without rounding and clipping.
    """

    nodes: Mapping[str, tuple[int, int]]
    values: int
    moved: tuple[float, ...] | None = None

    @property
    def before(self) -> int:
        """The number of values that are clipped without the adapter."""
        return sum(before for before, _ in self.nodes.values())

    @property
    def after(self) -> int:
        """The number of values that are clipped with the adapter."""
        return sum(after for _, after in self.nodes.values())

    @property
    def warning(self) -> str | None:
        """A warning if quantization distorts the model more with the adapter than without it; otherwise None.

        There is a warning if a node clips more values with the adapter than without it, or if the
        change of the outputs (`moved`) exceeds the limits that `MOST_MOVED` and `TIMES` set.
        """
        worst = max(self.nodes, key=lambda name: self.nodes[name][1] - self.nodes[name][0], default=None)
        more = worst is not None and self.nodes[worst][1] > self.nodes[worst][0]
        before, after = self.moved or (0.0, 0.0)
        if not more and after <= max(MOST_MOVED, TIMES * before):
            return None
        count = (
            f"static quantization clips {self.after} of {self.values} values with the adapter, {self.before} without it"
        )
        if more:
            count += f"; the largest increase is at the node {worst}"
        if self.moved is not None:
            count += (
                f". With the adapter, rounding and clipping change the outputs by {after:.2g} times the largest output "
                f"value; without the adapter, by {before:.2g} times"
            )
        return f"{count}. {CURE}"

    def record(self) -> dict[str, JsonValue]:
        """Return the counts and `moved` as JSON data."""
        nodes = {name: list(counts) for name, counts in self.nodes.items()}
        moved = None if self.moved is None else list(self.moved)
        return {"before": self.before, "after": self.after, "values": self.values, "nodes": nodes, "moved": moved}


def quantizers(model: ir.Model) -> list[ir.Node]:
    """Return the nodes of the main graph that quantize activations with a stored scale."""
    return [
        node
        for node in model.graph
        if node.op_type == "QuantizeLinear" and node.domain in ("", "ai.onnx") and len(node.inputs) > 1
        and not is_constant(node.inputs[0]) and is_constant(node.inputs[1])
    ]  # fmt: skip


def compared(before: ir.Model, after: ir.Model, feeds: Mapping[str, Array], more: Mapping[str, Array]) -> Saturation:
    """Run the graph without and with the adapter, and count the values that each QuantizeLinear clips.

    Args:
        before: the original graph.
        after: the graph with the adapter.
        feeds: a value for each input that both graphs have.
        more: a value for each input that only the graph with the adapter has.
    """
    without, _ = _clipped(before, feeds)
    counts, values = _clipped(after, {**feeds, **more})
    both = {name: (without.get(name, 0), count) for name, count in counts.items()}
    return Saturation({name: each for name, each in both.items() if any(each)}, values)


def clipping(saturation: Saturation | None, model: ir.Model) -> tuple[str, ...]:
    """Return a warning if static quantization distorts the model more with the adapter, or if nothing was checked.

    Args:
        saturation: the result of the check; None if the check did not run.
        model: the graph. Without a check, there is a warning only if the graph quantizes activations.
    """
    if saturation is not None:
        return () if saturation.warning is None else (saturation.warning,)
    if not quantizers(model):
        return ()
    how = "The check that counts clipped values did not run: omit --no-check (check=False), or pass check={...}"
    return (f"static quantization may clip values that are larger with the adapter. {CURE}. {how}",)


def _clipped(model: ir.Model, feeds: Mapping[str, Array]) -> tuple[dict[str, int], int]:
    """Run a graph and count the values that its QuantizeLinear nodes clip.

    Returns:
        a map from each node's name to its number of clipped values, and the number of all quantized values.
    """
    nodes, outputs = quantizers(model), list(model.graph.outputs)
    seen = list(dict.fromkeys(node.inputs[0] for node in nodes))
    # Declare the quantizers' inputs as outputs, so that a run returns them.
    model.graph.outputs.extend(value for value in seen if value is not None and value not in outputs)
    try:
        values_seen = _run(model, [value.name or "" for value in seen if value is not None], feeds)
    finally:
        del model.graph.outputs[len(outputs) :]
    counts: dict[str, int] = {}
    for node in nodes:
        x = values_seen[node.inputs[0].name or ""]  # type: ignore[union-attr]
        counts[node.name or node.outputs[0].name or ""] = _beyond(node, x)
    sizes: int = sum(values_seen[node.inputs[0].name or ""].size for node in nodes if node.inputs[0] is not None)
    return counts, sizes


def _run(model: ir.Model, names: list[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
    taken = {value.name for value in model.graph.inputs}
    names = list(dict.fromkeys(names))
    inputs = [name for name in names if name in taken]  # onnxruntime refuses an output that is also an input.
    wanted = [name for name in names if name not in taken]
    for value in [value for value in model.graph.outputs if value.name in inputs]:
        model.graph.outputs.remove(value)
    # Do not optimize: onnxruntime would fuse quantizers with other nodes, and would then not compute their inputs.
    session = started(inline(model), optimized=False)
    # If `wanted` is empty, do not run the graph: for an empty list of names, onnxruntime would return all outputs.
    given = {name: array for name, array in feeds.items() if name in taken}
    results = session.run(wanted, given) if wanted else []
    return {**{name: np.asarray(feeds[name]) for name in inputs}, **dict(zip(wanted, results, strict=True))}


def _beyond(node: ir.Node, x: Array) -> int:
    """Return the number of values that a QuantizeLinear clips if its input is `x`."""
    scale, zero = (None if one is None else numbers(one) for one in (*node.inputs[1:3], None)[:2])
    kind = np.dtype(np.uint8) if zero is None else zero.dtype
    if zero is None and (output_dtype := attribute(node, "output_dtype", 0)):
        kind = ir.DataType(output_dtype).numpy()
    if kind.kind not in "iu" and not kind.name.startswith(("int", "uint")):
        return 0  # Count only integers: floating-point types saturate by other rules.
    limits: Any = import_module("ml_dtypes").iinfo(kind)
    assert scale is not None
    axis = attribute(node, "axis", 1)
    if scale.size > 1 and (attribute(node, "block_size", 0) or not -x.ndim <= axis < x.ndim):
        return 0
    spread = [1] * x.ndim
    if scale.size > 1:
        spread[axis] = scale.size
    zeros = np.zeros(1) if zero is None else zero.astype(np.float64)
    steps, middle = (array.astype(np.float64).reshape(spread if array.size > 1 else -1) for array in (scale, zeros))
    low, high = float(limits.min), float(limits.max)
    q = np.rint(x.astype(np.float64) / steps) + middle
    # If the zero point is the lowest or highest integer, do not count the values that are clipped to it. Such a zero
    # point implements a Relu, so this clipping is intended.
    return int((((q < low) & (middle > low)) | ((q > high) & (middle < high))).sum())
