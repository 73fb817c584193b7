"""Replace convolutions in onnxruntime's own layouts by plain convolutions, to which adapters can be attached.

At `GraphOptimizationLevel.ORT_ENABLE_ALL`, onnxruntime stores kernels and activations in blocks of channels. The block
size depends on the processor. A graph that is saved in this layout gives wrong results on a processor with another
block size, and the file does not record the block size. This module finds the block size with the base's weights: if a
stored kernel is converted to the plain layout with the right block size, the result equals a weight of the base.
The plain graph runs on any processor. When onnxruntime loads the plain graph, it stores the channels in blocks again.

The blocked kernels stay in the file. New nodes convert them to the plain layout, and onnxruntime runs these nodes only
once, when it loads the graph.
https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/core/optimizer/nchwc_transformer.cc
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ..io.lazy import as_array
from .building import Array, Attribute, Branch, Building, element_type, takes_over
from .operands import attribute, is_constant, nodes_of, numbers, shape_of

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint

BLOCKED = "com.microsoft.nchwc"
"""The domain of operators that read or write blocks of channels."""

SIZES = (4, 8, 16, 32, 64)
"""Block sizes to try: the number of floats in a processor's vector register, or twice as many."""

ELEMENTWISE = frozenset(
    {"Relu", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid", "Clip", "Gelu", "QuickGelu", "Add", "Sum", "Mul"}
)
"""Operators of other domains that onnxruntime also runs on blocked values. All blocked inputs of such a node have the
same shape."""

POOLS = frozenset({"MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"})

SAME = 0.02
"""Largest accepted distance between a kernel and a base weight, relative to the kernel's norm. Before the comparison,
each output channel of the base weight is multiplied by the factor that brings it closest to the kernel."""


class _Unknown(Exception):
    """The blocked nodes cannot be replaced; the message gives the reason."""


def is_reordered(model: ir.Model) -> bool:
    """Whether a graph has convolutions in the blocked layout, or integer convolutions in the channels-last layout."""
    return any(_is_blocked(node) or _is_channels_last(node) for node in nodes_of(model))


def unblock(model: ir.Model, base: Checkpoint | None) -> str | None:
    """Replace all blocked nodes of a graph by plain nodes, if the base's weights show the block size.

    Also replace integer convolutions in the channels-last layout by convolutions in the channels-first layout. This
    step does not need the base.

    Args:
        model: the graph, which is changed.
        base: the weights that the graph was exported from; if None, blocked nodes are not replaced.

    Returns:
        The reason why blocked nodes could not be replaced; None if all were replaced, or if `base` is None.
    """
    for node in [node for node in nodes_of(model) if _is_channels_last(node)]:
        _channels_first(model, node)
    if base is None or not any(_is_blocked(node) for node in nodes_of(model)):
        return None
    try:
        region = _Region(model)
        _Unblocking(model, region, _size(region, base)).done()
    except _Unknown as reason:
        return str(reason)
    return None


def _is_blocked(node: ir.Node) -> bool:
    return node.domain == BLOCKED and node.op_type == "Conv"


def _is_channels_last(node: ir.Node) -> bool:
    last = node.op_type == "QLinearConv" and node.domain == "com.microsoft" and attribute(node, "channels_last", 0)
    return bool(last) and isinstance(node.graph, ir.Graph) and len(shape_of(node.inputs[3])) > 2  # type: ignore[arg-type]


def _channels_first(model: ir.Model, node: ir.Node) -> None:
    """Replace a channels-last integer convolution by ONNX's `QLinearConv`, which uses the channels-first layout.

    The kernel stays unchanged, because both operators store it in the same order.
    """
    building, graph, old = Building(model), node.graph, node.outputs[0]
    branch = Branch(building, node.name or node.op_type)
    axes = list(range(len(shape_of(node.inputs[3]))))  # type: ignore[arg-type]
    zero = node.inputs[7]
    assert isinstance(graph, ir.Graph)
    kinds = [np.dtype(np.uint8) if one is None else element_type(one) for one in (node.inputs[2], zero)]
    first, last = [0, axes[-1], *axes[1:-1]], [0, *axes[2:], 1]
    # Remove the Transposes that onnxruntime added around the convolution, so that a DequantizeLinear reads the
    # convolution's output. An adapter's change is then added to the DequantizeLinear's output. If a Transpose read the
    # convolution's output, `opened_up` would round the sum to integers again, and their range would clip the change.
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    if _transposes(before, last):
        x = before.inputs[0]  # type: ignore[union-attr]
    else:
        x = branch.node("Transpose", [node.inputs[0]], {"perm": first}, kinds[0], None)
    words = {name: one.value for name, one in node.attributes.items() if name != "channels_last"}
    y = branch.node("QLinearConv", [x, *node.inputs[1:]], words, kinds[1], None)
    new = branch.node("Transpose", [y], {"perm": last}, kinds[1], None)
    for one in branch.nodes:
        one.metadata_props.update(node.metadata_props)
    graph.insert_before(node, branch.nodes)
    after = [use.node for use in old.uses() if _transposes(use.node, first)]
    for one in after:
        if not one.outputs[0].is_graph_output():
            ir.convenience.replace_all_uses_with(one.outputs[0], y)
    takes_over(old, new, branch)
    graph.remove(node, safe=True)
    for turn in (*after, new.producer(), before):
        turns = _transposes(turn, first) or _transposes(turn, last)
        if turn is None or not turns or turn.graph is not graph:
            continue
        if not any(out.uses() or out.is_graph_output() for out in turn.outputs):
            graph.remove(turn, safe=True)
    building.settle()


def _transposes(node: ir.Node | None, order: Sequence[int]) -> bool:
    """Whether a node is a Transpose with the permutation `order`."""
    known = node is not None and node.op_type == "Transpose" and node.domain in ("", "ai.onnx")
    return known and list(attribute(node, "perm", ())) == list(order)  # type: ignore[arg-type]


class _Channels:
    """The channels of a blocked value. Values that must have the same number of channels share one `_Channels`.

    Attributes:
        padded: the number of channels, including the zero channels that fill the last block; None if no kernel shows
            this number.
        stated: the number of channels, without the zero channels that fill the last block; None if no node shows this
            number.
        parts: if a Concat writes the value, the Concat's inputs; otherwise empty.
        full: True if the last block needs no zero channels to fill it. onnxruntime requires this for a Concat and for
            grouped convolutions.
    """

    def __init__(self, padded: int | None, stated: int | None = None) -> None:
        self.padded, self.stated = padded, stated
        self.parts: tuple[ir.Value, ...] = ()
        self.full = False


class _Region:
    """The blocked values of a graph, and the nodes that read or write them. The graph stays unchanged.

    Attributes:
        channels: a map from each blocked value to its channels.
        convs: the blocked convolutions, in the graph's order.
        nodes: all nodes that read or write blocked values, in the graph's order.
        size: the block size, if a Reshape node shows it; otherwise None.
    """

    def __init__(self, model: ir.Model) -> None:
        self.channels: dict[ir.Value, _Channels] = {}
        self.convs: list[ir.Node] = []
        self.nodes: list[ir.Node] = []
        self.size: int | None = None
        for node in nodes_of(model):
            blocked = [value for value in node.inputs if value in self.channels]
            if node.domain != BLOCKED and not blocked:
                continue
            if node.graph is not model.graph:
                raise _Unknown(f"{_name(node)} is in a subgraph")
            self.nodes.append(node)
            self._read(node, blocked)
        if any(value.is_graph_output() for value in self.channels):
            raise _Unknown("an output of the graph is blocked")

    def _read(self, node: ir.Node, blocked: list[ir.Value]) -> None:
        op, out = node.op_type, node.outputs[0]
        if node.domain != BLOCKED:
            self._plain(node, blocked)
        elif op == "ReorderInput":
            x = node.inputs[0]
            at = -1 if attribute(node, "channels_last", 0) else 1
            size = None if x is None or x.shape is None else x.shape[at]
            if not isinstance(size, int):
                raise _Unknown(f"the graph does not record how many channels {_name(node)} reads")
            self.channels[out] = _Channels(None, size)
        elif op == "ReorderOutput":
            self._state(blocked[0], int(attribute(node, "channels", 0)), node)
        elif op == "Conv":
            self._conv(node)
        elif op in POOLS or op == "Upsample":
            self.channels[out] = self.channels[blocked[0]]
        else:
            raise _Unknown(f"the operator {op} of {_name(node)} is unknown")

    def _conv(self, node: ir.Node) -> None:
        x, W, bias, more = (*node.inputs, None, None)[:4]
        if x is None or not is_constant(W) or (bias is not None and not is_constant(bias)):
            raise _Unknown(f"the kernel or the bias of {_name(node)} is not a constant")
        shape = shape_of(W)  # type: ignore[arg-type]
        if len(shape) != 4 or (more is not None and more not in self.channels):
            raise _Unknown(f"{_name(node)} has a kernel without 4 axes, or a fourth input that is not blocked")
        self.convs.append(node)
        out = node.outputs[0]
        if _is_depthwise(node):
            if x not in self.channels:
                raise _Unknown(f"the depthwise convolution {_name(node)} reads an input that is not blocked")
            self.channels[out] = self.channels[x]
            self.channels[out].padded = shape[0]
        else:
            self.channels[out] = _Channels(shape[0])
            if x in self.channels and attribute(node, "group", 1) > 1:
                self.channels[x].full = self.channels[out].full = True
        if more is not None:
            self._join(more, out)

    def _plain(self, node: ir.Node, blocked: list[ir.Value]) -> None:
        op, out = node.op_type, node.outputs[0]
        others = [value for value in node.inputs if value is not None and value not in self.channels]
        if op in ELEMENTWISE and all(is_constant(one) and not shape_of(one) for one in others):
            for value in blocked[1:]:
                self._join(value, blocked[0])
            self.channels[out] = self.channels[blocked[0]]
        elif op == "Concat" and attribute(node, "axis", 0) == 1 and not others:
            for value in blocked:
                self.channels[value].full = True
            self.channels[out] = joined = _Channels(None)
            joined.parts, joined.full = tuple(blocked), True
        elif op == "Reshape" and len(others) == 1 and is_constant(others[0]):
            # If onnxruntime cannot prove that the operands of an addition have equal shapes, it first reshapes them to
            # five axes. The fifth axis contains the channels of a block.
            sizes = [int(size) for size in numbers(others[0])]
            if sizes[:4] != [0, -1, 0, 0] or len(sizes) > 5:
                raise _Unknown(f"{_name(node)} changes the blocked layout")
            self.size = sizes[4] if len(sizes) == 5 else self.size
            self.channels[out] = self.channels[blocked[0]]
        else:
            raise _Unknown(f"the operator {op} of {_name(node)} reads blocked values")

    def _join(self, one: ir.Value, other: ir.Value) -> None:
        """Record that two values have the same number of channels."""
        kept, gone = self.channels[one], self.channels[other]
        if kept is gone:
            return
        kept.padded = kept.padded if gone.padded is None else gone.padded
        kept.stated = kept.stated if gone.stated is None else gone.stated
        kept.full |= gone.full
        kept.parts = kept.parts or gone.parts
        for value, channels in self.channels.items():
            if channels is gone:
                self.channels[value] = kept

    def _state(self, value: ir.Value, number: int, node: ir.Node) -> None:
        channels = self.channels[value]
        if channels.stated not in (None, number):
            raise _Unknown(f"{_name(node)} writes {number} channels, but another node requires {channels.stated}")
        channels.stated = number


def _size(region: _Region, base: Checkpoint) -> int:
    """Find the block size by trial: convert kernels to the plain layout, and compare them with the base's weights.

    A block size fits a kernel if the converted kernel equals a weight of the base. Several sizes can fit the same
    kernel. Return the size for the first kernel that only one size fits.

    Raises:
        _Unknown: the shapes of the kernels rule out every block size, or each kernel is fitted by several sizes or by
            none.
    """
    sizes = [size for size in SIZES if region.size in (None, size) and _divides(region, size)]
    if not sizes:
        raise _Unknown("no block size fits the channel counts of all kernels")
    for node in region.convs:
        fits = [size for size in sizes if _is_of_base(_ordered(node, size, node.inputs[0] in region.channels), base)]
        if len(fits) == 1:
            return fits[0]
    raise _Unknown("no kernel matches a weight of the base with exactly one block size")


def _divides(region: _Region, size: int) -> bool:
    """Whether the shapes of all kernels are possible with the block size `size`."""
    for node in region.convs:
        out, into, *_ = shape_of(node.inputs[1])  # type: ignore[arg-type]
        # If a kernel has fewer input channels than a block, onnxruntime keeps the convolution's input unblocked.
        wrong = into % size != 0 if node.inputs[0] in region.channels else into >= size
        if out % size or (wrong and not _is_depthwise(node)):
            return False
    return True


def _is_depthwise(node: ir.Node) -> bool:
    shape = shape_of(node.inputs[1])  # type: ignore[arg-type]
    group = attribute(node, "group", 1)
    return bool(group > 1 and group == shape[0] and shape[1] == 1)


def _ordered(node: ir.Node, size: int, blocked: bool) -> Array:
    """Return the kernel of a convolution in the plain layout, `[out, in, height, width]`."""
    W = numbers(node.inputs[1])  # type: ignore[arg-type]
    shape, order = _axes(W.shape, size, blocked and not _is_depthwise(node))
    return W.reshape(shape).transpose(order).reshape(W.shape)


def _axes(shape: Sequence[int], size: int, inputs: bool) -> tuple[list[int], list[int]]:
    """Return the blocked layout of a kernel: the sizes of its axes, and their permutation to the plain layout.

    Args:
        shape: the kernel's shape, `[out, in, height, width]`, including the channels that fill the last block.
        size: the number of channels in a block.
        inputs: whether the input channels are also stored in blocks.
    """
    out, into, height, width = shape
    if inputs:
        return [out // size, into // size, height, width, size, size], [0, 5, 1, 4, 2, 3]
    return [out // size, into, height, width, size], [0, 4, 1, 2, 3]


def _is_of_base(V: Array, base: Checkpoint) -> bool:
    """Whether a kernel equals a base weight, up to one factor for each output channel.

    A norm that was folded into the convolution leaves such factors.
    """
    for leaf in base.tensors.values():
        shape = leaf.shape
        if len(shape) != 4 or not leaf.dtype.floating or shape[2:] != V.shape[2:] or int(np.prod(shape[1:])) < 2:
            continue
        # The kernel may have more channels than the weight: channels of zeros, which fill the last block.
        if not 0 <= len(V) - shape[0] < max(SIZES) or not 0 <= V.shape[1] - shape[1] < max(SIZES):
            continue
        W = as_array(leaf).astype(np.float64).reshape(shape[0], -1)
        rows = V[: shape[0], : shape[1]].astype(np.float64).reshape(shape[0], -1)
        factors = (rows * W).sum(1) / np.maximum((W * W).sum(1), 1e-300)
        rest = float(((rows - factors[:, None] * W) ** 2).sum()) + float((V.astype("f8") ** 2).sum() - (rows**2).sum())
        if rest <= SAME**2 * float((rows**2).sum()):
            return True
    return False


class _Unblocking:
    """One pass that replaces the blocked nodes of a graph.

    Args:
        model: the graph.
        region: the graph's blocked values.
        size: the number of channels in a block.
    """

    def __init__(self, model: ir.Model, region: _Region, size: int) -> None:
        self.model, self.region, self.size = model, region, size
        self.building = Building(model)
        self.counts = {id(channels): self._count(channels) for channels in region.channels.values()}
        for node in region.convs:  # Check all kernels before the first change.
            self._check(node)

    def done(self) -> None:
        for node in self.region.nodes:
            if node.domain != BLOCKED and node.op_type != "Reshape":
                self._shaped(node.outputs[0], node.outputs[0])
                continue
            branch = Branch(self.building, node.name or node.op_type)
            new = self._replacement(node, branch)
            out = node.outputs[0]
            self._shaped(out, new)
            assert isinstance(node.graph, ir.Graph)
            if out.is_graph_output() and new.producer() not in branch.nodes:
                new = branch.node("Identity", [new], None, np.float32, None)
            for one in branch.nodes:
                one.metadata_props.update(node.metadata_props)
            node.graph.insert_before(node, branch.nodes)
            takes_over(out, new, branch)
            node.graph.remove(node, safe=True)
        self.building.settle()
        self.model.graph.opset_imports.pop(BLOCKED, None)

    def _count(self, channels: _Channels) -> int:
        """Return the number of channels, without the zero channels that fill the last block.

        Raises:
            _Unknown: the nodes contradict each other about this number.
        """
        if channels.parts:
            count = sum(self._count(self.region.channels[part]) for part in channels.parts)
        elif channels.padded is None:
            assert channels.stated is not None
            count = channels.stated
        elif channels.full:
            count = channels.padded
        else:
            count = channels.stated or max(self._used(channels), channels.padded - self.size + 1)
        whole = -(-count // self.size) * self.size
        stated = count if channels.stated is None else channels.stated
        if count != stated or channels.padded not in (None, whole) or (channels.full and count != whole):
            raise _Unknown("the graph's nodes contradict each other about a number of channels")
        return count

    def _used(self, channels: _Channels) -> int:
        """Return the number of channels up to the last channel with a nonzero value in a kernel or a bias."""
        most, channels_of = 0, self.region.channels.get
        for node in self.region.convs:
            x = node.inputs[0]
            assert x is not None
            writes = channels_of(node.outputs[0]) is channels
            reads = channels_of(x) is channels and not _is_depthwise(node)
            V = _ordered(node, self.size, x in self.region.channels) if writes or reads else np.zeros((0, 0, 0, 0))
            if writes:
                bias = node.inputs[2] if len(node.inputs) > 2 else None
                most = max(most, _last(V.any(axis=(1, 2, 3))), 0 if bias is None else _last(numbers(bias)))
            if reads:
                most = max(most, _last(V.any(axis=(0, 2, 3))))
        return most

    def _check(self, node: ir.Node) -> None:
        """Refuse a kernel with nonzero values at the input channels that only pad the last block."""
        x = node.inputs[0]
        assert x is not None
        if x not in self.region.channels or _is_depthwise(node) or attribute(node, "group", 1) > 1:
            return
        into = self._channels(x)
        if into < shape_of(node.inputs[1])[1] and _ordered(node, self.size, True)[:, into:].any():  # type: ignore[arg-type]
            raise _Unknown(f"the kernel of {_name(node)} has nonzero values at channels that only pad a block")

    def _channels(self, value: ir.Value) -> int:
        return self.counts[id(self.region.channels[value])]

    def _shaped(self, old: ir.Value, new: ir.Value) -> None:
        """Record the channels of `new`, which replaces the blocked value `old`.

        The nodes that read `new` are replaced later, and need the number of its channels.
        """
        if old in self.region.channels:
            self.region.channels[new] = self.region.channels[old]
            new.shape = ir.Shape([None, self._channels(old), None, None])
            new.type = ir.TensorType(ir.DataType.FLOAT)

    def _replacement(self, node: ir.Node, branch: Branch) -> ir.Value:
        """Append the plain nodes for a blocked node, and return their output."""
        op, x = node.op_type, node.inputs[0]
        assert x is not None
        last = bool(attribute(node, "channels_last", 0))
        words = {name: one.value for name, one in node.attributes.items()}
        if op in ("Reshape", "ReorderInput", "ReorderOutput"):
            if not last:
                return x
            perm = [0, 3, 1, 2] if op == "ReorderInput" else [0, 2, 3, 1]
            return branch.node("Transpose", [x], {"perm": perm}, np.float32, None)
        if op == "Conv":
            return self._conv(node, branch)
        if op == "Upsample":
            scales = self.building.literal(np.asarray(words.pop("scales"), np.float32))
            words |= {"nearest_mode": "floor"} if words.get("mode", "nearest") == "nearest" else {}
            words.setdefault("coordinate_transformation_mode", "asymmetric")
            return branch.node("Resize", [x, None, scales], words, np.float32, None)
        return branch.node(op, [x], words, np.float32, None)

    def _conv(self, node: ir.Node, branch: Branch) -> ir.Value:
        x, W, b, more = (*node.inputs, None, None)[:4]
        assert x is not None
        assert W is not None
        out, blocked, depthwise = self._channels(node.outputs[0]), x in self.region.channels, _is_depthwise(node)
        shape = shape_of(W)
        stored, order = _axes(shape, self.size, blocked and not depthwise)
        into = self._channels(x) if blocked and attribute(node, "group", 1) == 1 else shape[1]
        W = branch.node("Reshape", [W, self._sizes(stored)], None, np.float32, stored)
        W = branch.node("Transpose", [W], {"perm": order}, np.float32, [stored[axis] for axis in order])
        W = branch.node("Reshape", [W, self._sizes(shape)], None, np.float32, shape)
        if (out, into) != shape[:2]:
            W = self._cut(branch, W, (out, into), (out, into, *shape[2:]))
        b = b if b is None or shape_of(b) == (out,) else self._cut(branch, b, (out,), (out,))
        words: dict[str, Attribute] = {name: one.value for name, one in node.attributes.items()}
        activation = str(words.pop("activation", ""))
        numbers_ = [float(one) for one in words.pop("activation_params", ())]  # type: ignore[union-attr]
        if depthwise:
            words["group"] = out
        y = branch.node("Conv", [x, W, b], words, np.float32, None)
        y = y if more is None else branch.node("Add", [y, more], None, np.float32, None)
        return y if not activation else self._activated(branch, y, activation, numbers_)

    def _activated(self, branch: Branch, y: ir.Value, activation: str, given: list[float]) -> ir.Value:
        if activation == "Clip":
            ends = [self.building.literal(np.asarray(end, np.float32)) for end in given]
            return branch.node("Clip", [y, *ends], None, np.float32, None)
        names = {"LeakyRelu": ("alpha",), "HardSigmoid": ("alpha", "beta")}.get(activation, ())
        return branch.node(activation, [y], dict(zip(names, given, strict=False)), np.float32, None)

    def _sizes(self, sizes: Sequence[int]) -> ir.Value:
        return self.building.literal(np.asarray(sizes, np.int64))

    def _cut(self, branch: Branch, value: ir.Value, ends: Sequence[int], shape: Sequence[int]) -> ir.Value:
        """Slice a kernel or a bias: keep the first `ends[n]` channels along axis `n`."""
        given = [self._sizes([0] * len(ends)), self._sizes(ends), self._sizes(range(len(ends)))]
        return branch.node("Slice", [value, *given], None, np.float32, shape)


def _last(used: object) -> int:
    """Return the length of a vector without the zeros at its end."""
    at = np.flatnonzero(np.asarray(used))
    return int(at[-1]) + 1 if len(at) else 0


def _name(node: ir.Node) -> str:
    return node.name or node.op_type
