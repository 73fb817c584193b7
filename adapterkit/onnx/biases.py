"""Find out whether a vector that a graph adds to a layer's output is the layer's bias.

Updates such as IA3 also change the bias. Exporters write a bias as an input of the layer's node, or as an Add right
after this node. Other tools store the bias with more axes, subtract its negative, or add it after a Reshape. But an
added vector need not be the bias: it may be a parameter of the module around the layer. The base's weights show whether
the vector is the bias; without the base, the names that the exporter wrote may show it. If neither does, an error is
raised.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ..errors import USE_EXPORTED_BASE, Unsupported
from ..io.lazy import as_array
from ..naming.moves import same_end
from .building import Branch, Building, element_type, takes_over
from .experts import Experts
from .fused_nodes import Attention
from .layers import Conv, Gather, GraphLayer, by_channel, only_reader, refuse_fused_bias
from .modules import SCOPES, listed
from .operands import DEEP, is_constant, numbers, shape_of
from .recurrent import Recurrent
from .resolved import NEAR, BaseBias, ResolvedTarget, Spot

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from .building import Array

KEEPS_ORDER = {"Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten"}
"""Operators that keep the order of the elements. If an Add follows such an operator and adds a vector along the last
axis, the Add can be moved before the operator."""

PASSES = KEEPS_ORDER | {
    "Transpose", "Cast", "QuantizeLinear", "DequantizeLinear", "Split", "Slice", "Dropout",
}  # fmt: skip
"""Operators that may be between a layer and the node that adds the layer's bias."""

PADDLE = (("w_0", "b_0"), ("_weights", "_offset"))
"""Pairs of suffixes that PaddlePaddle gives to the names of a layer's weight and bias."""

_COPY = re.compile(r"_deepcopy_\d+$")
"""Suffix that paddle2onnx appends to each parameter's name. A layer's weight and bias get different numbers."""

BROADCAST = {"MatMul", "Add", "Sub", "Mul", "Div", "Equal", "Cast", "Identity"}
"""Operators whose output has at least as many axes as each input."""

WIDE = 64
"""Maximum number of values that one search through the graph visits, such as the search for a bias's name."""

_AGAIN = "Export the graph again, so that the bias is an input of the layer's node or of an Add right after this node"


def changes_bias(place: ResolvedTarget) -> bool:
    """Whether an update of a target changes the layer's bias."""
    return any(update.kind in ("additive", "weight") and update.changes_bias for update in place.updates)


def with_base_bias(place: ResolvedTarget, base: Checkpoint) -> ResolvedTarget:
    """Return the target with `bias` set to the bias that the layer has in the base.

    The target is returned unchanged if no update changes the bias, if the graph has no layer for the target, or if the
    layer's weight is not found in the base.
    """
    if not changes_bias(place) or not place.spots:
        return place
    for path in dict.fromkeys((place.target.path, place.asked.path)):
        for full_name in (f"{path}.weight", path):
            alike = (
                [full_name]
                if full_name in base.tensors
                else [name for name in base.tensors if same_end(_COPY.sub("", name), _COPY.sub("", full_name))]
            )
            if len(alike) != 1:
                continue
            if alike[0].endswith("weight"):
                return replace(place, bias=_base_bias(base, f"{alike[0].removesuffix('weight')}bias"))
            if biases := _paddle_biases(alike[0]):
                of_layer = [name for name in base.tensors if _COPY.sub("", name) in biases]
                return replace(place, bias=_base_bias(base, of_layer[0] if len(of_layer) == 1 else biases[0]))
    return place


def _paddle_biases(weight: str) -> list[str]:
    """Return the names that PaddlePaddle may give to the bias of the layer whose weight has the name `weight`."""
    weight = _COPY.sub("", weight)
    return [f"{weight.removesuffix(end)}{bias}" for end, bias in PADDLE if weight.endswith(end)]


def _base_bias(base: Checkpoint, name: str) -> BaseBias | None:
    leaf = base.tensors.get(name)
    if leaf is not None and not leaf.dtype.floating:
        return None
    others = {key: one for key, one in base.tensors.items() if len(one.shape) == 1 and one.dtype.floating}
    others.pop(name, None)
    return BaseBias(None if leaf is None else as_array(leaf).astype(np.float32).reshape(-1), others)


def settle_biases(places: Sequence[ResolvedTarget], building: Building) -> None:
    """Find the layers' biases that updates change. If needed, move a bias to an Add right after its layer.

    If the vector that is added to a layer's output is not the layer's bias, put the layer's node into
    `building.apart`, so that updates do not change the vector.

    Raises:
        Unsupported: the graph adds a vector to a layer's output, and it is unknown whether this vector is the bias. Or
            the graph computes the bias. Or the bias cannot be added right after the layer. Or the base has a nonzero
            bias that was not found in the graph. Or one node computes several layers with different biases.
    """
    for place in places:
        for spot in dict.fromkeys(place.spots):
            _refuse_shared(spot, place)
            exempt = place.target.stacked or issubclass(spot.kind, Attention | Experts | Gather | Recurrent)
            exempt = exempt or place.norm is not None
            if not exempt and changes_bias(place):
                _settle(spot, place, building)


def _refuse_shared(spot: Spot, place: ResolvedTarget) -> None:
    """Raise an error if an optimizer merged several layers with equal weights and inputs into this node."""
    uses = list(spot.node.outputs[0].uses())
    if len(uses) < 2:
        return
    adds = [use.node for use in uses if use.node.op_type == "Add" and use.node.domain in ("", "ai.onnx")]
    stems = {
        name.removesuffix(".bias")
        for add in adds for other in add.inputs if other is not None and is_constant(other)
        for name in _names(other) if name.endswith(".bias")
    }  # fmt: skip
    if len(stems) > 1:
        why = f"the node computes several layers with equal weights ({', '.join(sorted(stems))})"
        cure = "Use the graph before it is optimized: there, each layer has its own node"
        raise Unsupported(why, where=str(place.asked), cure=cure)


@dataclass(frozen=True, slots=True, eq=False)
class _Added:
    """A value that a node adds to a layer's output, or subtracts from it.

    Attributes:
        node: the node that adds the value.
        value: the added value, which may be the layer's bias.
        passed: the nodes between the layer and `node`.
        negative: True if `node` is a Sub, which subtracts the value.
        first: whether nothing else is added to the output before this value.
    """

    node: ir.Node
    value: ir.Value
    passed: tuple[ir.Node, ...]
    negative: bool
    first: bool


def _settle(spot: Spot, place: ResolvedTarget, building: Building) -> None:
    layer = spot.kind(spot.node, Branch(building, f"adapterkit/{place.target}"))
    where = str(place.asked)
    if _in_float_sums(layer) or _before_activation(layer):
        layer = spot.kind(spot.node, layer.branch)
    if layer.stated_bias is not None:
        b = None if layer.bias is None else layer.bias.numbers().reshape(-1)
        if b is not None and _is_bias(layer, layer.node, b, place, plain=True):
            return
        if layer.bias is None and not _may_be_foreign(layer.stated_bias, place, layer):
            why = f"the graph computes the bias of this {layer.node.op_type}"
            raise Unsupported(why, where=where, cure="Export the model with the bias as a stored tensor")
        building.apart.add(layer.node)
    elif layer.after is not None:
        add, bias = layer.after
        plain = len(shape_of(bias)) == 1 and layer.node.op_type != "Gemm"
        if _is_bias(layer, add, numbers(bias).reshape(-1), place, plain, bias):
            return
        building.apart.add(layer.node)
    if layer.inside:
        _refuse_lost(place, where)
        return
    refuse_fused_bias(layer, where)
    for added in _added(layer):
        if not _may_be_bias(added, layer, place):
            continue
        constant = is_constant(added.value)
        vector = _vector(added, layer) if constant else None
        if constant and not _is_bias(layer, added.node, vector, place, False, added.value):
            continue
        if vector is None or layer.apart or layer.stated_bias is not None or not _brought(added, vector, layer):
            if _zero(place):
                continue
            kind = added.node.op_type
            through = ", ".join(node.op_type for node in added.passed)
            why = f"an update cannot change this layer's bias, which the operator {kind} adds"
            why += f" after {through}" if through else ""
            raise Unsupported(why, where=where, cure=_AGAIN)
        building.apart.discard(layer.node)
        return
    _refuse_lost(place, where)


def _in_float_sums(layer: GraphLayer) -> bool:
    """If a QLinearAdd adds a constant after a layer, replace it with DequantizeLinear, Add and QuantizeLinear.

    Returns:
        Whether a QLinearAdd was replaced.
    """
    value = layer.result
    again = only_reader(value, "QuantizeLinear")
    value = value if again is None else again.outputs[0]
    uses = list(value.uses())
    node = uses[0].node if len(uses) == 1 else None
    if node is None or (node.op_type, node.domain) != ("QLinearAdd", "com.microsoft") or len(node.inputs) < 7:
        return False
    first, second = node.inputs[:3], node.inputs[3:6]
    source, other = (first, second) if uses[0].idx == 0 else (second, first)
    if node.graph is not layer.node.graph or uses[0].idx not in (0, 3) or not all(map(is_constant, other[:2])):
        return False
    q, scale, zero = (None if one is None else numbers(one).astype(np.float32) for one in other)
    assert q is not None
    assert scale is not None
    b = ((q - (0 if zero is None else zero)) * scale).astype(np.float32)
    branch, building, graph = layer.branch, layer.branch.building, node.graph
    assert graph is not None
    name = f"{(other[0].name or 'bias').removesuffix('_quantized')}"  # type: ignore[union-attr]
    summand = building.tensor(("sum", name, b.tobytes()), name, lambda: b)
    if not summand.is_initializer():
        building.model.graph.register_initializer(summand)
    y = branch.node("DequantizeLinear", source, None, np.float32, None)
    total = branch.node("Add", [y, summand], None, np.float32, None)
    branch.nodes[-1].name = building.name(node.name or "Add")
    branch.nodes[-1].metadata_props.update(node.metadata_props)
    limits = [*node.inputs[6:8], None][:2]
    kind = np.uint8 if limits[1] is None else element_type(limits[1])
    new = branch.node("QuantizeLinear", [total, *limits], None, kind, None)
    y.shape = total.shape = node.outputs[0].shape
    graph.insert_after(node, branch.nodes)
    takes_over(node.outputs[0], new, branch)
    graph.remove(node, safe=True)
    branch.nodes.clear()
    return True


def _before_activation(layer: GraphLayer) -> bool:
    """If a BiasGelu or a FastGelu adds a vector after a layer, split this node into an Add and the activation.

    Returns:
        Whether a node was split.
    """
    uses = list(layer.result.uses())
    node = uses[0].node if len(uses) == 1 and uses[0].idx == 0 else None
    if node is None or node.domain != "com.microsoft" or node.op_type not in ("BiasGelu", "FastGelu"):
        return False
    stored_array = node.inputs[1] if len(node.inputs) == 2 else None
    if (
        stored_array is None
        or not is_constant(stored_array)
        or shape_of(stored_array) != (layer.outputs,)
        or node.graph is None
    ):
        return False
    total = layer.branch.node("Add", [layer.result, stored_array], None, layer.dtype, None)
    total.shape = layer.result.shape
    node.graph.insert_before(node, layer.branch.nodes)
    layer.branch.nodes.clear()
    node.replace_input_with(0, total)
    node.resize_inputs(1)
    if node.op_type == "BiasGelu":
        node.op_type = "Gelu"
    return True


def _zero(place: ResolvedTarget) -> bool:
    return place.bias is not None and (place.bias.numbers is None or not place.bias.numbers.any())


def _refuse_lost(place: ResolvedTarget, where: str) -> None:
    """Raise an error if the base has a nonzero bias for the layer, because this bias was not found in the graph."""
    if place.bias is None or _zero(place):
        return
    why = "the layer has a bias in the base, but it is unclear where the graph adds this bias"
    raise Unsupported(why, where=where, cure="Export the graph again without optimizations")


def _is_bias(
    layer: GraphLayer,
    adds: ir.Node,
    vector: Array | None,
    place: ResolvedTarget,
    plain: bool,
    bias: ir.Value | None = None,
) -> bool:
    """Whether the vector that a node adds to a layer's output is the layer's bias.

    Args:
        layer: the layer.
        adds: the node that adds the vector.
        vector: the vector as `[out]`, one element for each output channel; None if it cannot have this shape.
        place: the layer's target.
        plain: True if the graph adds the vector in the way in which exporters usually add a bias. The vector then
            counts as the bias, unless the base or the nodes' names show that it is not.
        bias: the graph value that holds the vector; None if the layer's own node reads the vector.

    Raises:
        Unsupported: nothing shows whether the vector is the bias; or the vector equals neither the layer's bias in the
            base nor another vector of the base.
    """
    where = str(place.asked)
    named = bias is not None and _is_named(bias, place)
    if place.bias is not None and vector is not None and (is_same := _in_base(vector, place)) is not None:
        return is_same
    if bias is None or named:
        return True
    modules = _modules(layer.node, adds)
    if modules is not None:
        return modules[0] == modules[1]
    if plain:
        return True
    why = (
        f"the graph adds the vector {_names(bias)[0]} to the layer's output; this is either (1) its bias, which the "
        "update changes, or (2) a parameter of the module around the layer, which must not change"
    )
    if place.bias is not None and vector is None:
        raise Unsupported(why, where=where, cure=_AGAIN)
    weight = place.asked.path if _paddle_biases(place.asked.path) else f"{place.asked.path}.weight"
    cure = f"Pass weights of the base that contain {weight}, to show whether the vector is the layer's bias"
    raise Unsupported(why, where=where, cure=f"{cure}: --base-weights DIR (base_weights=)")


def _in_base(vector: Array, place: ResolvedTarget) -> bool | None:
    """Whether a vector equals the bias that the target's layer has in the base; None if the shapes do not fit.

    Raises:
        Unsupported: the vector equals neither the layer's bias in the base nor another vector of the base.
    """
    assert place.bias is not None
    base, rows = place.bias.numbers, slice(*place.target.rows) if place.target.rows else slice(None)
    if base is None:
        if not vector.any() or _is_other(vector, place.bias):
            return False
        why = "the base has no bias for this layer and lacks the vector that the graph adds to the layer's output"
        cure = "Pass all weights of the base: --base-weights DIR (base_weights=)"
        raise Unsupported(why, where=str(place.asked), cure=cure)
    for part in (vector[rows], vector):
        if part.shape == base.shape:
            if _near(part, base):
                return True
            if _is_other(part, place.bias):
                return False
            why = "the vector that the graph adds to the layer's output differs from the layer's bias in the base"
            raise Unsupported(why, where=str(place.asked), cure=USE_EXPORTED_BASE)
    return None


def _is_other(vector: Array, bias: BaseBias) -> bool:
    """Whether a vector equals any vector in the base other than the layer's bias."""
    alike = (leaf for leaf in bias.others.values() if tuple(leaf.shape) == vector.shape)
    return any(_near(vector, as_array(leaf).astype(np.float32)) for leaf in alike)


def _near(one: Array, other: Array) -> bool:
    if one.shape != other.shape:
        return False
    far = float(np.linalg.norm(one.astype(np.float64) - other))
    return far <= NEAR * float(np.linalg.norm(other.astype(np.float64)))


def _may_be_foreign(value: ir.Value, place: ResolvedTarget, layer: GraphLayer) -> bool:
    """Whether a value cannot be the layer's bias.

    No value is the bias if the layer has no bias in the base. A value without the bias's name cannot be the bias if it
    depends on the model's inputs, as a residual does, or if it is a constant that does not have exactly one element for
    each output channel.
    """
    if place.bias is not None and place.bias.numbers is None:
        return True
    if _is_named(value, place):
        return False
    if is_constant(value):
        return not by_channel(shape_of(value), layer.outputs, -1)
    # A module's bias never depends on the model's inputs.
    return _depends(value)


def _added(layer: GraphLayer) -> Iterator[_Added]:
    """Yield the values that nodes add to a layer's output, directly or after additions and operators in `PASSES`."""
    waiting: list[tuple[ir.Value, tuple[ir.Node, ...], bool]] = [(layer.result, (), True)]
    for _ in range(WIDE):
        if not waiting:
            return
        value, passed, first = waiting.pop(0)
        for use in value.uses():
            node, at = use.node, use.idx
            if len(passed) > DEEP:
                continue
            if node.domain not in ("", "ai.onnx"):
                continue
            if node.op_type in ("Add", "Sub", "Sum"):
                others = [one for place, one in enumerate(node.inputs) if one is not None and place != at]
                usual = node.op_type != "Sub" or at == 0
                for other in others:
                    yield _Added(node, other, passed, node.op_type == "Sub", first and usual and len(others) == 1)
                waiting.append((node.outputs[0], (*passed, node), False))
            elif node.op_type in PASSES and at == 0:
                waiting += [(out, (*passed, node), first) for out in node.outputs]


def _may_be_bias(added: _Added, layer: GraphLayer, place: ResolvedTarget) -> bool:
    """Whether an added value may be the layer's bias, judging by its name, its size, and the nodes' modules."""
    if added.value is layer.stored_bias or added.node is (None if layer.after is None else layer.after[0]):
        return False
    if _is_named(added.value, place):
        return True
    if not added.first:
        return False
    if not is_constant(added.value):
        sizes = [] if added.value.shape is None else list(added.value.shape)
        known = [int(size) for size in sizes if isinstance(size, int)]
        fits = added.value.shape is None or len(known) < len(sizes) or math.prod(known) == layer.outputs
        return fits and not _apart(layer.node, added.node) and not _depends(added.value)
    parted = any(node.op_type in ("Split", "Slice") for node in added.passed)
    size = math.prod(shape_of(added.value))
    if parted:
        modules = _modules(layer.node, added.node)
        return modules is not None and modules[0] == modules[1] and size > 1
    return size == layer.outputs > 1


def _vector(added: _Added, layer: GraphLayer) -> Array | None:
    """Return an added vector as `[out]`, one element for each output channel; None if it cannot have this shape."""
    vector = numbers(added.value)
    vector = -vector if added.negative else vector
    if vector.size != layer.outputs:
        return None
    # If the vector has more axes than the value to which it is added, the sum has as many axes as the vector. Adding
    # the vector as `[out]` right after the layer would then give a sum with fewer axes.
    last = added.passed[-1].outputs[0] if added.passed else layer.result
    most = max(2 if not added.passed else 0, -layer.channel, _least_axes(last))
    shapes = [node for node in added.passed if node.op_type != "Identity"]
    if not shapes:
        fits = by_channel(vector.shape, layer.outputs, layer.channel) and vector.ndim <= most
        return vector.reshape(-1) if fits else None
    if isinstance(layer, Conv):
        axis = _channel_after(shapes, layer)
        return vector.reshape(-1) if axis is not None and by_channel(vector.shape, layer.outputs, axis) else None
    if layer.channel != -1 or not {node.op_type for node in shapes} <= KEEPS_ORDER:
        return None
    ends = list(vector.shape)
    while ends and ends[0] == 1:
        ends.pop(0)
    fits = vector.ndim <= max(len(ends), most)
    return vector.reshape(-1) if ends and fits and _last_sizes(shapes[-1], len(ends)) == ends else None


def _least_axes(value: ir.Value | None, depth: int = 5) -> int:
    """Return a lower bound for a value's number of axes; the exact number if the graph shows the value's shape."""
    if value is None or depth == 0:
        return 0
    if value.shape is not None:
        return len(value.shape)
    node = value.producer()
    if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in BROADCAST:
        return 0
    return max(_least_axes(one, depth - 1) for one in node.inputs)


def _channel_after(nodes: Sequence[ir.Node], layer: GraphLayer) -> int | None:
    """Return the negative index of the channel axis in the value that `nodes` compute from a convolution's output.

    Returns:
        None if a node slices or removes the channel axis, or has an unknown effect on the axes.
    """
    rank = 1 - layer.channel
    axes = list(range(rank))  # The index that each axis had in the convolution's output; -1 for a new axis.
    for node in nodes:
        given = [None if one is None or not is_constant(one) else numbers(one) for one in node.inputs[1:]]
        moved = node.attributes["axes"].as_ints() if "axes" in node.attributes else given[-1] if given else None
        if node.op_type == "Transpose":
            order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(axes))[::-1]
            axes = [axes[at] for at in order]
        elif node.op_type == "Squeeze" and moved is not None:
            gone = {int(at) % len(axes) for at in moved}
            axes = [axis for at, axis in enumerate(axes) if at not in gone]
        elif node.op_type == "Unsqueeze" and moved is not None:
            total = len(axes) + len(moved)
            new, rest = {int(at) % total for at in moved}, iter(axes)
            axes = [-1 if at in new else next(rest) for at in range(total)]
        elif node.op_type == "Slice" and 3 <= len(given) <= 4 and all(one is not None for one in given):
            starts, stops, at, *steps = (one.astype(np.int64).tolist() for one in given if one is not None)
            cuts = zip(starts, stops, at, *(steps or [[1] * len(at)]), strict=True)
            whole = (0, layer.outputs, 1)
            if any(
                axes[axis] == 1 and (start, min(stop, layer.outputs), step) != whole for start, stop, axis, step in cuts
            ):
                return None
        else:
            return None
    return axes.index(1) - len(axes) if 1 in axes else None


def _last_sizes(node: ir.Node, count: int) -> list[int] | None:
    """Return the last `count` sizes in the shape of a node's output; None if they are unknown.

    If the graph does not declare the shape of a Reshape's output, the sizes are read from the Reshape's shape input.
    """
    sizes = node.outputs[0].shape
    last = None if sizes is None else list(sizes)[-count:]
    if last is not None and len(last) == count and all(isinstance(size, int) for size in last):
        return [int(size) for size in last]  # type: ignore[arg-type]
    given = node.inputs[1] if node.op_type == "Reshape" and len(node.inputs) > 1 else None
    parts: list[int] = []
    cast = None if given is None or is_constant(given) else given.producer()
    if cast is not None and cast.op_type == "Cast":
        given = cast.inputs[0]  # tf2onnx computes sizes as int32, and casts them to int64 for the Reshape.
    while given is not None and len(parts) < count:
        source = given.producer()
        if is_constant(given):
            parts = [int(size) for size in numbers(given).reshape(-1)] + parts
            break
        tail = source.inputs[-1] if source is not None and source.op_type == "Concat" else None
        if source is None or tail is None or not is_constant(tail):
            return None
        parts = [int(size) for size in numbers(tail).reshape(-1)] + parts
        given = None
    last_sizes = parts[-count:]
    return last_sizes if len(last_sizes) == count and min(last_sizes) > 0 else None


def _brought(added: _Added, vector: Array, layer: GraphLayer) -> bool:
    """Replace the node that adds or subtracts a vector with an Add right after the layer.

    Returns:
        Whether the node was replaced. The node is not replaced if a value between the layer and the node has other
        readers, if the node is not the first addition after the layer, or if the nodes are in different graphs.
    """
    graph, building = layer.node.graph, layer.branch.building
    chain = [layer.result, *(node.outputs[0] for node in added.passed)]
    single = all(len(list(value.uses())) == 1 and not value.is_graph_output() for value in chain)
    made_by = layer.result.producer()
    if not single or not added.first or (added.node.op_type == "Sum" and len(added.node.inputs) != 2):
        return False
    if graph is None or made_by is None or any(node.graph is not graph for node in (*added.passed, added.node)):
        return False
    spread = vector.reshape(-1, *[1] * (-layer.channel - 1))
    name = f"{added.value.name}.bias"
    summand = building.tensor(("bias", name, vector.tobytes()), name, lambda: np.ascontiguousarray(spread))
    if not summand.is_initializer():
        building.model.graph.register_initializer(summand)
    out, end = ir.Value(name=building.name(f"{name}/output"), type=layer.result.type), added.node.outputs[0]
    add = ir.node("Add", [layer.result, summand], outputs=[out], name=building.name(added.node.name or f"{name}/Add"))
    add.metadata_props.update(added.node.metadata_props)
    out.shape = layer.result.shape
    after = added.passed[0] if added.passed else added.node
    graph.insert_after(made_by, [add])
    after.replace_input_with(list(after.inputs).index(layer.result), out)
    last = added.passed[-1].outputs[0] if added.passed else out
    takes_over(end, last, layer.branch)
    graph.remove(added.node, safe=True)
    return True


def _is_named(value: ir.Value, place: ResolvedTarget) -> bool:
    """Whether a value is a tensor with the name of a target's bias, or is computed from such a tensor."""
    paths = dict.fromkeys((place.target.path, place.asked.path))
    names = [name.removesuffix("_quantized") for name in _names(value)]
    biases = [f"{path}.bias" for path in paths] + [bias for path in paths for bias in _paddle_biases(path)]
    return any(same_end(name, bias) or same_end(_COPY.sub("", name), bias) for name in names for bias in biases)


def _names(value: ir.Value) -> list[str]:
    """Return the name of a value, and the names of the stored tensors and graph inputs that it is computed from."""
    return [one.name or "" for one in _behind(value) if one is value or _is_stored(one)]


def _is_stored(value: ir.Value) -> bool:
    node = value.producer()
    return node is None or node.op_type == "Constant"


def _depends(value: ir.Value) -> bool:
    """Whether a value depends on the graph's inputs; also True if the search stops because it visited `WIDE` values."""
    behind = list(_behind(value))
    inputs = any(one.producer() is None and one.const_value is None for one in behind)
    return inputs or len(behind) >= WIDE


def _behind(value: ir.Value) -> Iterator[ir.Value]:
    waiting, seen = [value], set[ir.Value]()
    while waiting and len(seen) < WIDE:
        one = waiting.pop(0)
        if one in seen:
            continue
        seen.add(one)
        yield one
        node = one.producer()
        waiting += [] if node is None else [each for each in node.inputs if each is not None]


def _modules(one: ir.Node, other: ir.Node) -> tuple[str, str] | None:
    """Return the names of the modules to which two nodes belong; None if the modules are unknown.

    The names are read from the exporter's metadata, or else from the nodes' names.
    """
    scopes = [listed(node.metadata_props.get(SCOPES))[-2:-1] for node in (one, other)]
    if all(scopes):
        return scopes[0][0], scopes[1][0]
    names = [node.name or "" for node in (one, other)]
    if not all("/" in name for name in names):
        return None
    first, second = (name.rpartition("/")[0] for name in names)
    # In names from TensorFlow, which do not begin with a slash, each operation of a module has its own scope. So two
    # nodes of one module may have different scopes.
    return (first, second) if first == second or all(name.startswith("/") for name in names) else None


def _apart(one: ir.Node, other: ir.Node) -> bool:
    """Whether two nodes are known to be in different modules."""
    modules = _modules(one, other)
    return modules is not None and modules[0] != modules[1]
