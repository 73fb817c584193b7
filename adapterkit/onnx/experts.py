"""Change experts in onnxruntime's nodes `MoE` and `QMoE`, which read the weights of all experts of a layer.

Such a node applies an activation between the two weights of an expert, so nodes after it cannot add a change. Instead,
an injection computes the changed stack of weights in new nodes before the `MoE` or `QMoE`, and a merge changes the
stored stack. For slots, the node is split into separate nodes for each expert; see expert_nodes.py.

Formulas get a stack `[expert, out, in]` as one matrix: the rows of expert 0, then the rows of expert 1, and so on. Each
part of an expert, such as its gate projection, is a range of these rows, as in torch. In the node's own stack, the rows
of fused gate and up projections alternate, beginning with a row of the gate projection.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MoE
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QMoE
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from ..errors import Unsupported
from .building import Array, Branch, Building, Dtype, element_type
from .changes import Fresh, Stored, lazily
from .layers import GraphLayer, weight_at
from .modules import dotted
from .operands import attribute, detached_copy, input_at, is_constant, numbers, shape_of
from .packed import PackedNumbers, Packing, joined_bits, numbers_in, replaced, split, unpacked
from .values import Value

if TYPE_CHECKING:
    from ..io.lazy import Lazy
    from .resolved import ResolvedTarget, Spot

OPERATORS = ("MoE", "QMoE")

EXPERT = "adapterkit.expert"
"""Metadata key of each Gemm in a split `MoE`; see expert_nodes.py. The value is the name of the expert's weight that
the Gemm multiplies by."""

FUSED = "gate_up_proj"
"""Last part of the name of a weight that fuses gate and up."""

LAYER = re.compile(r"(?:^|.*[./])(?:layers|h|blocks)\.(\d+)(?=[./]|$)")
"""Matches the start of a name, up to and including the layer's number, as in `model.layers.0`."""


def is_routed(node: ir.Node) -> bool:
    """Whether a node is a `MoE` or `QMoE`, which reads the weights of several experts."""
    return node.domain == "com.microsoft" and node.op_type in OPERATORS


def holds_experts(node: ir.Node) -> bool:
    """Whether a node is a `MoE` or `QMoE`, or a node of a split `MoE` that reads the weight of one expert."""
    return is_routed(node) or EXPERT in node.metadata_props


def fused(node: ir.Node) -> int:
    """Return how many matrices the first weight of each expert consists of: 2 for a fused gate and up, otherwise 1."""
    return 2 if attribute(node, "activation_type", "relu") == "swiglu" else 1


def unknown_layout(node: ir.Node) -> str | None:
    """Return why the layout of a node's weights is unknown or unsupported; None if it is supported."""
    packed = node.op_type == "QMoE"
    first, second, third = (2, 5, 8) if packed else (2, 4, 6)
    if any(input_at(node, at) is None or not is_constant(weight_at(node, at)) for at in (first, second)):
        return "its weights are not constants"
    if input_at(node, third) is not None:
        return "it has a third weight (fc3), which onnxruntime's CPU kernel does not support"
    if fused(node) == 2 and attribute(node, "swiglu_fusion", 0) != 1:
        return "the rows of its gates and ups do not alternate, and onnxruntime's CPU kernel supports no other order"
    if packed and (why := _unknown_packing(node)) is not None:
        return why
    one, two = (shape_of(_weight(node, at)) for at in (first, second))
    if len(one) != 3 or len(two) != 3:
        return "its weights do not have three axes"
    per = 8 // _bits(node) if packed else 1
    hidden, inner = two[1], two[2] * per
    # An older layout swaps the input and output axes. The shapes of the weights can be the same in both layouts, so
    # compare the input width with the shape of another tensor.
    width = _width(node, 7 if packed else 5)
    if one != (two[0], fused(node) * inner, hidden // per) or hidden % per or (width is not None and width != hidden):
        return "its weights are stored in an older or a prepacked layout"
    if width is None and fused(node) == 1 and hidden != inner:
        return "neither a bias nor the shape of its input shows which axis of its weights is the input axis"
    return None


def _unknown_packing(node: ir.Node) -> str | None:
    if attribute(node, "quant_type", "int") != "int" or _bits(node) not in (2, 4, 8):
        return "its weights are not integers of 2, 4 or 8 bits"
    if _bits(node, "fc2") != _bits(node):
        return "its two weights have different numbers of bits, which onnxruntime's CPU kernel does not support"
    if attribute(node, "weights_prepacked", 0) == 1:
        return "its weights are prepacked for one kind of processor"
    if any(one is not None for one in (*node.inputs[13:14], *node.inputs[15:])):
        return "it has global scales or activation scales"
    zeros = [one for one in node.inputs[11:13] if one is not None]
    if any(not is_constant(one) for one in (input_at(node, 3), input_at(node, 6), *zeros)):
        return "its scales or zero points are not constants"
    return None


def _width(node: ir.Node, bias: int) -> int | None:
    """Return the width of a node's input; None if neither the second bias nor the input has a known last axis."""
    stack, x = input_at(node, bias), node.inputs[0]
    shapes = [one.shape for one in (stack, x) if one is not None and one.shape is not None]
    return next((last for shape in shapes if isinstance(last := shape[-1], int)), None)


def _bits(node: ir.Node, weight: str = "fc1") -> int:
    return int(attribute(node, f"{weight}_expert_weight_bits", attribute(node, "expert_weight_bits", 4)))


def _weight(node: ir.Node, position: int) -> ir.Value:
    weight = weight_at(node, position)
    assert weight is not None
    return weight


class Experts(GraphLayer):
    """The stack of all experts' first weights, as a layer `[experts * out, in]`.

    The first weight of an expert fuses its gate and up projections, or is a single projection.

    Class attributes:
        vector: the position of the stacked biases among the node's inputs.
        first: True for first weights, which may fuse gate and up; False for second weights.
    """

    op_type = "MoE"
    position, inside = 2, True
    vector: ClassVar[int | None] = 3
    first: ClassVar[bool] = True

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        return is_routed(node) and node.op_type == cls.op_type and unknown_layout(node) is None

    @classmethod
    def turns(cls, node: ir.Node) -> bool:
        return False

    @classmethod
    def sizes(cls, node: ir.Node) -> tuple[int, int, int]:
        """Return `(experts, out, in)`: the number of experts, and the shape of each expert's weight."""
        experts, out, in_ = shape_of(cls.operand_of(node))
        return experts, out, in_

    @classmethod
    def stored_shape(cls, node: ir.Node) -> tuple[int, ...]:
        experts, out, in_ = cls.sizes(node)
        return experts * out, in_

    @classmethod
    def parts(cls, node: ir.Node) -> int:
        """Return the number of matrices in an expert's weight: 2 for gate and up, whose rows alternate; otherwise 1."""
        return fused(node) if cls.first else 1

    @classmethod
    def by_matrix(cls, stack: Array, node: ir.Node) -> Array:
        """Convert experts `[e, out, ...]` from the node's order of rows to torch's: first the gate, then the up."""
        several, parts = stack.reshape(len(stack), -1, cls.parts(node), *stack.shape[2:]), cls.parts(node)
        return stack if parts == 1 else several.swapaxes(1, 2).reshape(stack.shape)

    @classmethod
    def together(cls, stack: Array, node: ir.Node) -> Array:
        """Convert experts `[e, out, ...]` from torch's order of rows to the node's."""
        several, parts = stack.reshape(len(stack), cls.parts(node), -1, *stack.shape[2:]), cls.parts(node)
        return stack if parts == 1 else several.swapaxes(1, 2).reshape(stack.shape)

    @classmethod
    def stored_array(cls, node: ir.Node) -> Array:
        return cls.detached(node)()

    @classmethod
    def detached(cls, node: ir.Node) -> Callable[[], Array]:
        copy, shape = detached_copy(cls.operand_of(node)), cls.stored_shape(node)
        return lambda: cls.by_matrix(numbers(copy), node).reshape(shape)

    @classmethod
    def changed(cls, node: ir.Node, f: Callable[[Array, int], Array]) -> Callable[[], Array]:
        """Return a function that computes the changed stack, one expert at a time to save memory.

        Args:
            node: the node.
            f: a function that returns the changed weight of one expert. Its first argument is the weight: `[out, in]`,
                float64, with the rows in torch's order. Its second argument is the index of the weight's first row in
                the matrix of all experts.
        """
        copy, out = detached_copy(cls.operand_of(node)), cls.sizes(node)[1]

        def make() -> Array:
            stack: Array = numbers(copy).copy()
            for expert in range(len(stack)):
                W = cls.by_matrix(stack[expert : expert + 1].astype(np.float64), node)[0]
                stack[expert] = cls.together(f(W, expert * out)[None], node)[0]
            return stack

        return make

    @property
    def weight(self) -> Value:
        experts, out, in_ = self.sizes(self.node)
        read = self.node.inputs[self.position]
        assert read is not None
        stack = Value(self.branch, (experts, out, in_), self.dtype, read)
        return Value(
            self.branch, (experts * out, in_), self.dtype, self._ordered(stack, True).value, self.detached(self.node)
        )

    def back(self, W: Value) -> Value:
        return self._ordered(W.reshape(*self.sizes(self.node)), False, flat=False)

    def _ordered(self, stack: Value, apart: bool, flat: bool = True) -> Value:
        """Convert experts `[e, out, ...]` to torch's order of rows if `apart`, otherwise to the node's order."""
        (experts, out, *rest), parts = stack.shape, self.parts(self.node)
        if parts > 1:
            split = (out // parts, parts) if apart else (parts, out // parts)
            stack = stack.reshape(experts, *split, *rest).swapaxes(1, 2)
        return stack.reshape(*((experts * out, *rest) if flat else (experts, out, *rest)))

    @property
    def constant_bias(self) -> ir.Value | None:
        bias = self.stated_bias
        return bias if is_constant(bias) else None

    @property
    def has_bias(self) -> bool:
        return input_at(self.node, self.vector) is not None

    @property
    def bias(self) -> Value | None:
        bias, read = self.constant_bias, input_at(self.node, self.vector)
        if bias is None or read is None:
            return None
        stack = Value(self.branch, shape_of(bias), element_type(bias), read)
        copy, node = detached_copy(bias), self.node
        known = self._ordered(stack, True)
        return Value(
            self.branch, known.shape, stack.dtype, known.value, lambda: self.by_matrix(numbers(copy), node).reshape(-1)
        )

    def back_bias(self, b: Value) -> Value:
        experts, out, _ = self.sizes(self.node)
        return self._ordered(b.reshape(experts, out), False, flat=False)

    @classmethod
    def changed_bias(cls, node: ir.Node, bias: ir.Value, f: Callable[[Array], Array]) -> Callable[[], Array]:
        """Return a function that changes the biases with `f`. `f` gets them in torch's order, `[experts * out]`."""
        copy = detached_copy(bias)

        def make() -> Array:
            stack = numbers(copy).astype(np.float64)
            return cls.together(f(cls.by_matrix(stack, node).reshape(-1)).reshape(stack.shape), node)

        return make


class SecondExperts(Experts):
    """The stack of all experts' second weights, as a layer `[experts * hidden, inner]`."""

    position, vector, first = 4, 5, False


class PackedExperts(Experts):
    """The stack of first weights in a `QMoE`, packed along the input axis.

    Each row has one scale, or one scale for each of its blocks.

    Class attributes:
        middle: the position of the optional zero points among the node's inputs.
    """

    op_type = "QMoE"
    vector = 4
    middle: ClassVar[int] = 11

    @classmethod
    def sizes(cls, node: ir.Node) -> tuple[int, int, int]:
        experts, out, bytes_ = shape_of(cls.operand_of(node))
        return experts, out, bytes_ * 8 // _bits(node)

    @classmethod
    def scales(cls, node: ir.Node) -> ir.Value:
        """Return the scales, `[experts, out]` or `[experts, out, blocks]`."""
        return _weight(node, cls.position + 1)

    @classmethod
    def zeros(cls, node: ir.Node) -> Callable[[], Array | int]:
        """Return a function that computes the zero points `[experts * out, blocks]`, or one zero point for all rows."""
        stored, bits, (experts, out, in_) = input_at(node, cls.middle), _bits(node), cls.sizes(node)
        if stored is None:
            return lambda: 1 << (bits - 1)
        copy, size = detached_copy(stored), attribute(node, "block_size", 0)

        def make() -> Array:
            # Zero points are packed into bytes. With blocks, the zero points of each row begin at a new byte. Without
            # blocks, the zero points of each expert begin at a new byte.
            if size:
                return split(numbers(copy).reshape(experts * out, -1), bits)[:, : -(-in_ // size)]
            return split(numbers(copy).reshape(experts, -1), bits)[:, :out].reshape(experts * out, 1)

        return make

    @classmethod
    def detached(cls, node: ir.Node) -> Callable[[], Array]:
        (experts, out, in_), bits = cls.sizes(node), _bits(node)
        packed, scales = detached_copy(cls.operand_of(node)), detached_copy(cls.scales(node))
        zeros = cls.zeros(node)
        size = attribute(node, "block_size", 0) or in_

        def make() -> Array:
            q = unpacked(numbers(packed).reshape(experts * out, -1), bits).astype(np.float32)
            zero = zeros()
            q -= zero if isinstance(zero, int) else np.repeat(zero, size, axis=1)[:, :in_]
            factors = numbers(scales).reshape(experts * out, -1).astype(np.float32)
            W = q * np.repeat(factors, size, axis=1)[:, :in_]
            return cls.by_matrix(W.reshape(experts, out, in_), node).reshape(experts * out, in_)

        return make

    @property
    def dtype(self) -> Dtype:
        x = self.node.inputs[0]
        known = next((one for one in (x, self.node.outputs[0]) if one is not None and one.dtype is not None), None)
        return np.dtype(np.float32) if known is None else element_type(known)


class SecondPackedExperts(PackedExperts):
    """The stack of second weights in a `QMoE`, packed like the stack of first weights."""

    position, vector, first, middle = 5, 7, False, 12


EXPERTS: tuple[type[Experts], ...] = (Experts, SecondExperts, PackedExperts, SecondPackedExperts)


# Names of the experts in a graph. onnxruntime-genai's builder gives the name `moe` to the experts of every layer. So an
# expert's weight is named `model.layers.0.moe.experts.3.gate_proj` in a graph, whatever its name in the torch model is.


def layer_of(name: str) -> str | None:
    """Return the layer number that a name contains, as text; None if the name contains none."""
    match = LAYER.match(dotted(name) if name.startswith("/") else name)
    return None if match is None else match.group(1)


def stem_of(node: ir.Node) -> str | None:
    """Return the name of the model's layer that a node is in, such as `model.layers.0`.

    The name comes from the node's metadata, its weights' names or its own name. Return None if none of them shows it.
    """
    if EXPERT in node.metadata_props:
        return node.metadata_props[EXPERT].partition(".moe.experts.")[0]
    weights = (weight_at(node, at) for at in range(2, len(node.inputs)))
    names = [value.name or "" for value in weights if value is not None]
    for name in (*names, dotted(node.name or "")):
        match = LAYER.match(name)
        if match is not None:
            return match.group(0)
    return None


def path_of(stem: str, expert: int, part: str) -> str:
    """Return the name that a graph uses for one part of an expert, such as its `gate_proj` or `down_proj`."""
    return f"{stem}.moe.experts.{expert}.{part}"


def in_experts(spots: Sequence[Spot]) -> Iterator[Spot]:
    """Yield one spot for each part of each expert, such as its gate. The spot has the part's name and range of rows."""
    for spot in spots:
        if (weight := spot.node.metadata_props.get(EXPERT)) is not None:
            stem, _, word = weight.rpartition(".")
            for part, start, stop in _parts_of(word, spot.shape[0]):
                rows = None if (start, stop) == (0, spot.shape[0]) else (start, stop)
                names = {"initializer": (f"{stem}.{part}.weight",)}
                yield replace(spot, names=names, rows=rows, shape=(stop - start, spot.shape[1]))
            continue
        if not issubclass(spot.kind, Experts) or (stem_here := stem_of(spot.node)) is None:
            continue
        experts, out, in_ = spot.kind.sizes(spot.node)
        for expert in range(experts):
            word = "down_proj" if not spot.kind.first else FUSED if fused(spot.node) == 2 else "up_proj"
            for part, start, stop in _parts_of(word, out):
                rows = (expert * out + start, expert * out + stop)
                names = {"initializer": (f"{path_of(stem_here, expert, part)}.weight",)}
                yield replace(spot, names=names, rows=rows, shape=(stop - start, in_))


def _parts_of(word: str, out: int) -> list[tuple[str, int, int]]:
    """Return `(name, start, stop)`, a name and a range of rows, for each part of a weight and for the whole weight."""
    parts = [("gate_proj", 0, out // 2), ("up_proj", out // 2, out)] if word == FUSED else []
    return [*parts, (word, 0, out)]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertStack:
    """The experts of one layer of the model.

    Attributes:
        node: the `MoE` or `QMoE`, or the first node of a split `MoE`.
        stem: the layer's name, such as `model.layers.0`.
        experts: the number of experts.
        fused: whether the first weight of an expert fuses gate and up.
    """

    node: ir.Node
    stem: str
    experts: int
    fused: bool


def stacks_of(nodes: Sequence[ir.Node]) -> dict[str, ExpertStack]:
    """Return a map from each layer's number to the layer's experts. Nodes whose layout is unknown are left out."""
    stacks: dict[str, ExpertStack] = {}
    for node in nodes:
        if (weight := node.metadata_props.get(EXPERT)) is not None:
            stem, _, rest = weight.partition(".moe.experts.")
            expert, _, word = rest.partition(".")
            before = stacks.setdefault(layer_of(stem) or "", ExpertStack(node, stem, 0, False))
            experts, both = max(before.experts, int(expert) + 1), before.fused or word == FUSED
            stacks[layer_of(stem) or ""] = replace(before, experts=experts, fused=both)
            continue
        known = stem_of(node) if is_routed(node) and unknown_layout(node) is None else None
        number = None if known is None else layer_of(known)
        if known is not None and number is not None:
            stacks[number] = ExpertStack(node, known, shape_of(_weight(node, 2))[0], fused(node) == 2)
    return stacks


def as_floats(places: Sequence[ResolvedTarget], building: Building) -> list[ResolvedTarget]:
    """Replace each `QMoE` that contains a target by a `MoE` with dequantized weights; return the new targets."""
    new: dict[ir.Node, ir.Node] = {}
    spots: dict[Spot, Spot] = {}
    for spot in (spot for place in places for spot in place.spots):
        if not issubclass(spot.kind, PackedExperts) or spot in spots:
            continue
        if spot.node not in new:
            new[spot.node] = _as_float(spot.node, building)
        kind = Experts if spot.kind.first else SecondExperts
        spots[spot] = replace(spot, node=new[spot.node], kind=kind, sources=(kind.operand_of(new[spot.node]),))
    return [replace(place, spots=tuple(spots.get(spot, spot) for spot in place.spots)) for place in places]


def _as_float(node: ir.Node, building: Building) -> ir.Node:
    if input_at(node, 14) is not None:
        why = f"{node.name or node.outputs[0].name} has separate router weights, which a MoE node cannot have"
        raise Unsupported(why, where=node.name, cure="Merge with --quantized requantize (quantized='requantize')")
    inputs: list[ir.Value | None] = [*node.inputs[:2]]
    for kind in (PackedExperts, SecondPackedExperts):
        make, sizes = kind.detached(node), kind.sizes(node)
        dtype = ir.DataType.from_numpy(kind(node, Branch(building, "dequantize")).dtype)
        name = building.name(f"{(kind.operand_of(node).name or 'experts').removesuffix('.qweight')}.weight")
        # Bind the loop's variables as default arguments of the lambda, because the lambda runs only when the tensor is
        # written. By then, the loop has changed its variables.
        tensor = ir.LazyTensor(
            lambda make=make, sizes=sizes, dtype=dtype, name=name, kind=kind: ir.Tensor(  # type: ignore[misc]
                np.ascontiguousarray(kind.together(make().reshape(sizes), node).astype(dtype.numpy())), dtype=dtype,
                name=name,
            ),
            dtype, ir.Shape(sizes), cache=False, name=name,
        )  # fmt: skip
        value = ir.Value(name=name, shape=ir.Shape(sizes), type=ir.TensorType(dtype), const_value=tensor)
        building.model.graph.register_initializer(value)
        inputs += [value, input_at(node, kind.vector)]
    kept = {"k", "activation_type", "activation_alpha", "activation_beta", "normalize_routing_weights",
            "swiglu_fusion", "swiglu_limit", "use_sparse_mixer"}  # fmt: skip
    words = {name: attribute.value for name, attribute in node.attributes.items() if name in kept}
    out = ir.Value(name=building.name(f"{node.outputs[0].name}.floats"), type=node.outputs[0].type)
    out.shape = node.outputs[0].shape
    plain = ir.node("MoE", inputs, words, outputs=[out], domain="com.microsoft", name=node.name)
    plain.metadata_props.update(node.metadata_props)
    graph = node.graph
    assert graph is not None
    ir.convenience.replace_nodes_and_values(graph, node, [node], [plain], [node.outputs[0]], [out])
    return plain


class ExpertPacking(Packing):
    """The packing of a stack in a `QMoE`. In `shape` and `numbers`, the weights of all experts form one matrix."""

    def source(self, spot: Spot) -> Lazy:
        """Return the dequantized stack as one float32 matrix, with its rows in torch's order."""
        return lazily(spot.kind.detached(spot.node), self.shape, ir.DataType.FLOAT)


def packing_of(spot: Spot, building: Building, fresh: Fresh) -> ExpertPacking:
    """Return the quantized values of a `QMoE`'s stack, and two functions: one reorders rows, one stores new values."""
    kind, node = spot.kind, spot.node
    assert issubclass(kind, PackedExperts)
    (experts, out, in_), bits = kind.sizes(node), _bits(node)
    stored, scales, zeros = kind.operand_of(node), kind.scales(node), input_at(node, kind.middle)
    block = attribute(node, "block_size", 0)
    size = block or in_
    blocks, zero = -(-in_ // size), kind.zeros(node)()
    packed, factors = numbers(stored), numbers(scales)
    # Pad the last block of each row with zeros, which do not change the block's scale. `q` stores a zero as the zero
    # point. For blocks that need padding, onnxruntime supports only the default zero point, so pad `q` with it. `put`
    # removes the padding.
    wide = ((0, 0), (0, blocks * size - in_))
    q = np.pad(split(packed.reshape(experts * out, -1), bits), wide, constant_values=1 << (bits - 1))
    numbers_found = numbers_in(node, q, zero, factors.reshape(experts * out, blocks), (0, (1 << bits) - 1), bits)

    def put(new: PackedNumbers) -> None:
        arrays = joined_bits(new.q[:, :in_], bits).reshape(packed.shape), new.scale.reshape(factors.shape)
        for at, old, array in zip((kind.position, kind.position + 1), (stored, scales), arrays, strict=True):
            node.replace_input_with(at, replaced(building, fresh, old, array))
        if zeros is not None and not isinstance(new.zero, int):
            middle = joined_bits(new.zero if block else new.zero.reshape(experts, out), bits)
            array = middle.reshape(numbers(zeros).shape).astype(np.uint8)
            node.replace_input_with(kind.middle, replaced(building, fresh, zeros, array))

    def rows(W: Array) -> Array:
        return np.pad(kind.together(W.reshape(experts, out, in_), node).reshape(experts * out, in_), wide)

    return ExpertPacking(Stored(stored, False, ()), (experts * out, in_), numbers_found, rows, put)
