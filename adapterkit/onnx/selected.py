"""Add updates of stacks of experts to graphs in which a Gather selects the experts' weights for each token.

torch's exporter writes such graphs for transformers' models. The graph multiplies each token by the selected weight:
`y = MatMul(Gather(stack, experts), x)`. This module adds nodes that change this product. The added nodes use the same
indices to select the update's factors, so the graph never computes the change of a whole stack:

    y' = y + y * (s[experts] - 1) + s[experts] * (B[experts] @ (A[experts] @ x))

The result is the same as if each expert's weight W were `s * (W + B @ A)`. Some models, such as Llama 4, multiply the
tokens by all weights of a stack: `MatMul(x, stack)`. In these graphs, the factors of all experts are used, without a
selection.

Slots hold A `[e, r, in]`, B `[e, out, r]` and s `[e, out]`. The values of the slots are computed from an update's
tensors and the experts' weights; see open_factors.py.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import onnx_ir as ir

from ..core.updates import Additive, OutputUpdate, WeightUpdate
from ..errors import Unsupported
from ..io.lazy import from_numpy
from .building import Array, Branch, Building, Dtype, behind, element_type
from .layers import GraphLayer, weight_at
from .operands import attribute, detached_copy, is_constant, numbers, shape_of
from .resolved import through, wide
from .values import Value, plain

if TYPE_CHECKING:
    from torch import Tensor

    from .resolved import ResolvedTarget


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A MatMul that multiplies tokens by the weights of experts.

    Attributes:
        node: the MatMul.
        left: True for `W @ x`, where x has the shape `[in, n]`; False for `x @ W`.
        turned: whether a Transpose swaps the axes of the selected weights before the MatMul.
        axes: the number of axes of the selected weights, taken from a Transpose; None if there is no Transpose.
    """

    node: ir.Node
    left: bool
    turned: bool
    axes: int | None = None

    @property
    def by_rows(self) -> bool:
        """Whether an expert's weight is stored as `[out, in]`; otherwise, it is stored as `[in, out]`."""
        return self.left != self.turned

    @property
    def x(self) -> ir.Value:
        value = self.node.inputs[1 if self.left else 0]
        assert value is not None
        return value


def product_of(node: ir.Node) -> Product | None:
    """Return the MatMul that is the only reader of the weights that `node` selects; None if there is no such MatMul.

    One or two Transposes may precede the MatMul. If `node` itself is a MatMul with a whole stack, return this MatMul.
    """
    if node.op_type == "MatMul":
        return Product(node, is_constant(weight_at(node, 0)), False)
    value, turned, axes = node.outputs[0], False, None
    for _ in range(3):
        uses = list(value.uses())
        if len(uses) != 1 or value.is_graph_output():
            return None
        reader = uses[0].node
        if reader.op_type == "MatMul" and reader.domain in ("", "ai.onnx"):
            return Product(reader, uses[0].idx == 0, turned, axes)
        order: list[int] = list(attribute(reader, "perm", ()))
        kept = list(range(len(order)))
        if reader.op_type != "Transpose" or len(order) < 2:
            return None
        # Without optimization, torch's exports have a Transpose that keeps the order of all axes.
        if order != kept:
            if turned or order != [*kept[:-2], kept[-1], kept[-2]]:
                return None
            turned = True
        value, axes = reader.outputs[0], len(order)
    return None


class SelectedExperts(GraphLayer):
    """A node that selects weights from a stack of experts, `[e, out, in]` or `[e, in, out]`."""

    position = 0
    axes: ClassVar[Container[int]] = (3,)
    indexed = True

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        known = node.op_type in ("Gather", "GatherND") and node.domain in ("", "ai.onnx") and len(node.inputs) == 2
        stack = weight_at(node, 0) if known else None
        if stack is None or not is_constant(stack) or is_constant(node.inputs[1]) or len(shape_of(stack)) != 3:
            return False
        first = not attribute(node, "axis", 0) and not attribute(node, "batch_dims", 0)
        return first and element_type(stack).kind not in "iub" and product_of(node) is not None

    @classmethod
    def turns(cls, node: ir.Node) -> bool:
        return False

    @property
    def read(self) -> ir.Value:
        other = self.node.inputs[1 - self.position]
        assert other is not None
        return other

    def _bias_after(self, out: ir.Value) -> None:
        return None

    @classmethod
    def changed(cls, node: ir.Node, f: Callable[[Array, int], Array]) -> Callable[[], Array]:
        """Return a function that computes the whole changed stack, one expert at a time.

        Args:
            node: the node that reads the stack.
            f: a function that returns an expert's changed weight. Its arguments are the expert's stored weight, in
                float64, and the expert's index.
        """
        copy = detached_copy(cls.operand_of(node))

        def make() -> Array:
            stack: Array = numbers(copy).copy()
            for number in range(len(stack)):
                stack[number] = f(stack[number].astype(np.float64), number)
            return stack

        return make


class MultipliedExperts(SelectedExperts):
    """A node that multiplies tokens `[e, n, in]` by all weights of a stack of experts, `[e, in, out]`."""

    position = 1

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx") or len(node.inputs) != 2:
            return False
        stack, x = weight_at(node, cls.position), node.inputs[1 - cls.position]
        if stack is None or x is None or is_constant(x) or not is_constant(stack) or len(shape_of(stack)) != 3:
            return False
        return shape_of(stack)[0] > 1 and element_type(stack).kind not in "iub"


class LeftMultipliedExperts(MultipliedExperts):
    """A node that multiplies all weights of a stack of experts, `[e, out, in]`, by tokens `[e, in, n]`."""

    position = 0


SELECTED: tuple[type[SelectedExperts], ...] = (SelectedExperts, MultipliedExperts, LeftMultipliedExperts)


def refuse_selected(place: ResolvedTarget) -> None:
    """Check that the updates of a stack of selected experts can be added to the graph.

    Raises:
        Unsupported: an update changes the layer's output instead of the weight. Or an update changes a bias, and
            either the graph adds a bias, or the update can only be applied to a layer with a bias.
    """
    for update in place.updates:
        bias = update.changes_bias and (update.needs_bias or any(_adds_bias(spot.node) for spot in place.spots))
        if bias or isinstance(update, OutputUpdate):
            what = "a bias, but the experts' biases are in a separate stack" if bias else "the output of a layer"
            why = f"{update.method} changes {what}"
            raise Unsupported(why, where=str(place.asked), cure="Apply the adapter to the torch model instead")


def _adds_bias(node: ir.Node) -> bool:
    """Whether the graph adds a bias to the product with the experts' weights.

    An added value counts as a bias if it is a constant or comes from a Gather or GatherND.
    """
    product = product_of(node)
    assert product is not None
    waiting = [product.node.outputs[0]]
    while waiting:
        value = waiting.pop()
        for use in value.uses():
            if use.node.op_type in ("Squeeze", "Reshape", "Transpose", "Identity", "Cast"):
                waiting.append(use.node.outputs[0])
            elif use.node.op_type == "Add":
                other = use.node.inputs[1 - use.idx]
                made_by = None if other is None else _behind_axes(other)
                if is_constant(other) or (made_by is not None and made_by.op_type in ("Gather", "GatherND")):
                    return True
    return False


def _behind_axes(value: ir.Value) -> ir.Node | None:
    """Return the node that computes a value, skipping nodes that only change the value's axes."""
    node = value.producer()
    while node is not None and node.op_type in ("Squeeze", "Unsqueeze", "Reshape", "Identity") and node.inputs[0]:
        node = node.inputs[0].producer()
    return node


def expert_of(place: ResolvedTarget, number: int) -> ResolvedTarget:
    """Return a copy of a stack's target whose updates change only the expert with the index `number`."""
    experts = (wide(update).expert(number) for update in place.updates)
    return replace(place, updates=tuple(one.map(lambda leaf: from_numpy(np.asarray(leaf))) for one in experts))


def part_of_expert(W: Array, place: ResolvedTarget) -> Array:
    """Return a view of an expert's stored weight `W`, as `[out, in]`, with only the rows that a target changes."""
    seen = W.T if place.target.layout.startswith("e in") else W
    return seen[slice(*place.target.rows)] if place.target.rows else seen


SlotsOf = Callable[["ResolvedTarget", Branch, tuple[int, int, int], Dtype], dict[str, Value]]
"""The type of the bound method `Slots.stacked`, which creates or returns the slots of a stack of experts."""


def attach_selected(place: ResolvedTarget, building: Building, slots_of: SlotsOf | None) -> None:
    """Apply a stack's updates to the output of each MatMul that reads weights of the stack.

    Args:
        place: the stack, with its updates.
        building: the model that is being changed.
        slots_of: a function that creates slots for the updates' factors; None to store the factors in the graph.

    Raises:
        Unsupported: `refuse_selected` refuses an update. Or the shape of the indices that select experts is unknown.
    """
    refuse_selected(place)
    for spot in place.spots:
        node, product = spot.node, product_of(spot.node)
        assert product is not None
        branch = Branch(building, f"adapterkit/{place.target}")
        assert issubclass(spot.kind, SelectedExperts)
        stack = spot.kind.operand_of(node)
        dtype, y = element_type(stack), product.node.outputs[0]
        if slots_of is None:
            key = building.keep(place)
            arrays = stack_factors(place)
            named = {
                name: building.tensor((key, name, dtype.str), f"{place.target}.{name}", partial(array.astype, dtype))
                for name, array in arrays.items()
                if name != "s" or (array != 1).any()
            }
            factors = {name: Value(branch, arrays[name].shape, dtype, value) for name, value in named.items()}
        else:
            factors = slots_of(place, branch, _sizes(place), dtype)
        chosen = {name: _chosen(node, factor, place) for name, factor in factors.items()}
        x, old = plain(product.x, branch), plain(y, branch)
        x, old = (Value(branch, one.sizes, dtype, one.value) for one in (x, old))
        A, B, s = chosen["A"], chosen["B"], chosen.get("s")
        d = B @ (A @ x) if product.left else (x @ A.mT) @ B.mT
        new = old + d
        if s is not None:
            s = s[..., :, None] if product.left else s[..., None, :]
            new = old + old * (s - 1) + d * s
        behind(y, new.value, branch)
        branch.close()


def _chosen(node: ir.Node, factor: Value, place: ResolvedTarget) -> Value:
    """Select the same experts from a stacked factor as `node` selects from the stack of weights."""
    if node.op_type == "MatMul":  # A MatMul uses all experts.
        return factor
    indices = node.inputs[1]
    assert indices is not None
    product = product_of(node)
    axes = None if product is None else product.axes
    if indices.shape is not None:
        axes = len(indices.shape) - (node.op_type == "GatherND") + 2
    if axes is None:
        why = f"{node.name} ({node.op_type}) selects experts by indices whose number of axes is unknown"
        cure = "Infer the graph's shapes first, with onnx.shape_inference.infer_shapes"
        raise Unsupported(why, where=str(place.asked), cure=cure)
    words = {name: one for name, one in node.attributes.items() if name == "axis"}
    out = factor.branch.node(node.op_type, [factor.value, indices], words, factor.dtype, None)
    return Value(factor.branch, (*[None] * (axes - 2), *factor.shape[1:]), factor.dtype, out)


def _sizes(place: ResolvedTarget) -> tuple[int, int, int]:
    """Return the number of experts in a stack, and the numbers of outputs and of inputs of an expert's weight."""
    product = product_of(place.spots[0].node)
    assert product is not None
    experts, first, second = place.spots[0].shape
    return (experts, first, second) if product.by_rows else (experts, second, first)


def stack_factors(place: ResolvedTarget) -> dict[str, Array]:
    """Return the factors A `[e, r, in]`, B `[e, out, r]` and s `[e, out]` of a stack's updates, in float64.

    The updates change each expert's weight W, `[out, in]`, to `s * (W + B @ A)`.
    """
    spot, product = place.spots[0], product_of(place.spots[0].node)
    assert product is not None
    experts, out, _ = _sizes(place)
    seen_by_rows = not place.target.layout.startswith("e in")
    simple = all(isinstance(update, Additive) for update in place.updates)
    stack = None if simple else spot.kind.stored_array(spot.node)
    shape = part_of_expert(np.broadcast_to(0.0, spot.shape[1:]), place).shape
    triples = []
    for number in range(experts):
        one = expert_of(place, number)
        W = None if stack is None else part_of_expert(stack[number].astype(np.float64), place)
        s, B, A = _factors(one, shape, W, scaled=seen_by_rows == product.by_rows)
        if place.target.rows:
            first, stop = place.target.rows
            size = spot.shape[1] if seen_by_rows else spot.shape[2]
            B = np.pad(B, ((first, size - stop), (0, 0)))
            s = np.pad(s, (first, size - stop), constant_values=1.0)
        if seen_by_rows != product.by_rows:  # The updates change the transpose of the MatMul's weight, so swap A and B.
            s, B, A = np.ones(out), A.T, B.T
        triples.append((s, B, A))
    return {name: np.stack([each[at] for each in triples]) for at, name in ((2, "A"), (1, "B"), (0, "s"))}


def _factors(one: ResolvedTarget, shape: tuple[int, ...], W: Array | None, scaled: bool) -> tuple[Array, Array, Array]:
    """Return the factors s, B and A of one expert; if `scaled` is False, all values of s are 1."""
    updates: Sequence[Any] = [wide(update) for update in one.updates]
    ones = np.ones(shape[0])
    pairs = [update.pair(shape) if isinstance(update, Additive) else None for update in updates]
    if None not in pairs:
        Bs, As = ([np.asarray(pair[at], np.float64) for pair in pairs if pair is not None] for at in (0, 1))
        return ones, np.concatenate(Bs, 1), np.concatenate(As, 0)
    first = updates[0]
    if scaled and len(updates) == 1 and isinstance(first, WeightUpdate):
        has_factors = type(first).scaled_factors is not WeightUpdate.scaled_factors
        known: Any = first.scaled_factors(cast("Tensor", W)) if has_factors else None
        if known is not None:
            s, B, A = (np.asarray(each, np.float64) for each in known)
            return s, B, A
    start = np.zeros(shape) if W is None else W
    after = np.asarray(through(one, start)[0])
    if scaled and W is not None:
        # If an update only scales the outputs, like IA3, store s alone instead of a change of full rank.
        s = (after * W).sum(1) / np.maximum((W * W).sum(1), 1e-300)
        if np.allclose(after, s[:, None] * W, rtol=1e-12, atol=1e-12 * abs(W).max(initial=0.0)):
            return s, np.zeros((shape[0], 1)), np.zeros((1, shape[1]))
    D = after - start
    return (ones, D, np.eye(shape[1])) if shape[0] > shape[1] else (ones, np.eye(shape[0]), D)
