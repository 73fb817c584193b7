"""Find attention layers in a graph, and attach prefixes: learned keys and values that come before the computed ones.

Exporters write attention as `softmax(q @ k^T + mask) @ v`. The prefix's scores are concatenated in front of the
masked scores `q @ k^T + mask`, so the mask does not apply to the prefix. The prefix's values are concatenated in front
of `v`. The prefix is not part of any cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..core.adapter import Target
from ..core.updates import ContextUpdate
from ..errors import USE_ITS_BASE, ShapeMismatch, Unsupported
from ..io.lazy import as_array
from .building import Branch, Building, Dtype, before, element_type
from .modules import Module, module_at
from .operands import is_constant, shape_of
from .values import SYMBOLS, Value, computed_over, concatenated

if TYPE_CHECKING:
    from ..io.lazy import Leaf

_SCALARS = ("Sqrt", "Cast", "CastLike", "Identity", "Reciprocal")
_BEFORE = ("Mul", "Div", "Add", "Where", "Cast", "Identity")
_BEHIND = ("IsNaN", "Where", "Cast", "Identity", "Dropout")
_TURNS = ("Transpose", "Reshape", "Cast", "Identity")
_EXPORT = "Export the graph with torch's own exporter, and inject the adapter before the graph is optimized"

Factors = tuple[tuple[str, ir.Value], ...]
"""Pairs of an operator (`Mul` or `Div`) and a scalar graph value, in the order in which the graph applies them."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionNodes:
    """The graph nodes that compute the attention of one module.

    Attributes:
        module: the module that contains these nodes.
        softmax: the node that turns scores into attention weights.
        scores: the node that multiplies queries by keys.
        mixed: the node that multiplies attention weights by values.
        factors: the scalars by which the graph multiplies or divides the scores before the softmax.
    """

    module: Module
    softmax: ir.Node
    scores: ir.Node
    mixed: ir.Node
    factors: Factors

    @property
    def heads(self) -> int:
        """The number of heads.

        Raises:
            Unsupported: the graph does not show the number of heads.
        """
        return self._size(1)

    @property
    def width(self) -> int:
        """The number of channels of each head's values.

        Raises:
            Unsupported: the graph does not show the number of channels.
        """
        return self._size(3)

    def _size(self, axis: int) -> int:
        shape = self.mixed.outputs[0].shape
        size = None if shape is None or len(shape) != 4 else shape[axis]
        if not isinstance(size, int):
            raise Unsupported(
                "the graph does not show the number and size of this attention's heads",
                where=self.module.path,
                cure=_EXPORT,
            )
        return size


def attention_at(model: ir.Model, target: Target) -> AttentionNodes:
    """Return the attention nodes in the module that `target` names.

    Raises:
        TargetNotFound: the graph does not have this module.
        Unsupported: the module does not contain exactly one attention softmax, or the module adds a position bias to
            the scores.
    """
    where = str(target)
    module = module_at(model, target.path, where)
    softmaxes = [node for node in module.nodes if node.op_type == "Softmax" and node.domain in ("", "ai.onnx")]
    way = _way_back(softmaxes[0].inputs[0]) if len(softmaxes) == 1 else None
    mixed = _product_of(softmaxes[0].outputs[0]) if len(softmaxes) == 1 else None
    if way is None or mixed is None:
        raise Unsupported("the module must contain exactly one attention softmax", where=where, cure=_EXPORT)
    return AttentionNodes(module, softmaxes[0], way[0], mixed, way[1])


def with_prefixes(target: Target, updates: Sequence[ContextUpdate], building: Building) -> None:
    """Put the prefixes, in the updates' order, in front of the keys and values of the attention module at `target`.

    Raises:
        ShapeMismatch: the number or the size of a prefix's heads does not fit the attention module.
        Unsupported: a prefix has a gate, and the attention module does not have exactly one input that fits the gate.
        Also the errors of `attention_at`.
    """
    at = attention_at(building.model, target)
    branch = Branch(building, f"adapterkit/{target}")
    kind = element_type(at.mixed.outputs[0])
    pasts = [_past(update, at, branch, kind, target) for update in updates]
    past = (
        pasts[0]
        if len(pasts) == 1
        else concatenated([each * _ones(at, branch, each.dtype)[:, None] for each in pasts], 3)
    )
    if at.width != past.shape[-1]:
        why = f"the prefix was made for heads of size {past.shape[-1]}, but the attention's heads have size {at.width}"
        raise ShapeMismatch(why, where=str(target), cure=USE_ITS_BASE)
    # Apply the same factors to the prefix's keys and scores as the graph applies to its own keys and scores.
    keys = _times(past[:, 0], _factors_of(at.scores.inputs[1]), branch)
    queries = Value(branch, (None, at.heads, None, keys.shape[-1]), keys.dtype, at.scores.inputs[0])
    scores = _times(queries @ keys.mT, at.factors, branch)
    values = past[:, 1] * _ones(at, branch, kind)
    # The softmax's input is already masked, so the mask does not apply to the prefix's scores.
    joined = branch.node("Concat", [scores.value, at.softmax.inputs[0]], {"axis": -1}, kind, None)
    every = branch.node("Concat", [values.value, at.mixed.inputs[1]], {"axis": -2}, kind, None)
    for reader, position, new in ((at.softmax, 0, joined), (at.mixed, 1, every)):
        old = reader.inputs[position]
        assert old is not None
        before([reader], old, new, branch)
    branch.close()


def _past(update: ContextUpdate, at: AttentionNodes, branch: Branch, kind: Dtype, target: Target) -> Value:
    """Return a prefix's keys and values, `[rows or 1, 2, heads, n, d]`, where `heads` counts the query heads."""

    def value(leaf: Leaf) -> Value:
        array = as_array(leaf).astype(np.float64)
        return Value(branch, array.shape, kind, None, lambda: array)

    gate_input: Any = _reads(update, at, branch, target)
    pasts: Any = computed_over(update, value).prefix(gate_input)
    heads = pasts.shape[2]
    if at.heads % heads:
        why = f"the prefix was made for {heads} heads, but the attention has {at.heads}"
        raise ShapeMismatch(why, where=str(target), cure=USE_ITS_BASE)
    # In grouped-query attention, several query heads share one key head, and the graph repeats the key head for each of
    # them. Repeat the prefix's heads in the same way.
    shared = [head * heads // at.heads for head in range(at.heads)]
    out: Value = pasts if heads == at.heads else pasts[:, :, shared]
    return out


def _reads(update: ContextUpdate, at: AttentionNodes, branch: Branch, target: Target) -> Value | None:
    """If the prefix has a gate, return the attention module's input, which the gate reads; otherwise return None."""
    gate = update.tensors.get("gate")
    if gate is None:
        return None
    width = gate.shape[-1]
    entering = [v for v in at.module.entering if v.shape is not None and len(v.shape) == 3 and v.shape[2] == width]
    if len(entering) != 1:
        why = (
            f"the attention must have exactly one input with {width} channels, for the prefix's gate; "
            f"it has {len(entering)}"
        )
        raise Unsupported(why, where=str(target), cure=_EXPORT)
    return Value(branch, (None, None, width), element_type(entering[0]), branch.building.now(entering[0]))


def _ones(at: AttentionNodes, branch: Branch, kind: Dtype) -> Value:
    """Return a tensor of ones, `[rows, heads, 1, 1]`. Multiply a constant by it to repeat the constant for each row."""
    queries = Value(branch, (None, at.heads, None, None), kind, at.scores.inputs[0])
    return SYMBOLS.ones_like(queries[:, :, :1, :1])


def _times(value: Value, factors: Factors, branch: Branch) -> Value:
    for op, number in factors:
        other = Value(branch, (), value.dtype, number)
        value = value * other if op == "Mul" else value / other
    return value


def _way_back(value: ir.Value | None) -> tuple[ir.Node, Factors] | None:
    """Return the node that computes a softmax's scores, and the factors between this node and the softmax.

    Return None if there is no such node.
    """
    node = None if value is None else value.producer()
    if node is None:
        return None
    if node.op_type == "MatMul":
        return None if is_constant(node.inputs[1]) else (node, ())
    if node.op_type not in _BEFORE:
        return None
    # T5 adds relative position biases from a learned table to its scores. The prefix's scores would have no such bias.
    if node.op_type == "Add" and any(_looks_up_positions(one) for one in node.inputs):
        raise Unsupported("the attention adds position biases", where=node.name, cure="Use the torch model instead")
    for operand, factor in _operands(node):
        behind = _way_back(operand)
        if behind is not None:
            return behind[0], (*behind[1], *factor)
    return None


def _operands(node: ir.Node) -> Iterator[tuple[ir.Value | None, Factors]]:
    """Yield each input that may be the scores or the keys, with the factors that the node applies to this input."""
    for position, one in enumerate(node.inputs):
        if node.op_type not in ("Mul", "Div"):
            yield one, ()
            continue
        other = node.inputs[1 - position]
        if other is not None and _is_number(other) and (node.op_type == "Mul" or position == 0):
            yield one, ((node.op_type, other),)


def _factors_of(value: ir.Value | None) -> Factors:
    """Return the factors that the graph applies to the keys before it multiplies the queries by the keys."""
    node = None if value is None else value.producer()
    if node is None or node.op_type not in (*_TURNS, "Mul", "Div"):
        return ()
    if node.op_type in _TURNS:
        return _factors_of(node.inputs[0])
    operand, factor = next(_operands(node), (None, ()))
    return (*_factors_of(operand), *factor)


def without_factors(value: ir.Value | None) -> ir.Value:
    """Follow `value` back through all multiplications and divisions by scalars, and return the value before them."""
    assert value is not None
    node = value.producer()
    if node is None or node.op_type not in ("Mul", "Div"):
        return value
    operand, _ = next(_operands(node), (None, ()))
    return value if operand is None else without_factors(operand)


def _is_number(value: ir.Value | None) -> bool:
    """Whether a value is a scalar constant, or is computed from one."""
    if value is None:
        return False
    if is_constant(value):
        return int(np.prod(shape_of(value))) == 1
    node = value.producer()
    return node is not None and node.op_type in _SCALARS and _is_number(node.inputs[0])


def _looks_up_positions(value: ir.Value | None) -> bool:
    """Whether a value is looked up in a constant table of floats, like T5's relative position bias."""
    seen, left = set[ir.Value](), [value]
    while left:
        one = left.pop()
        node = None if one is None or one in seen else one.producer()
        if one is None or node is None or node.op_type == "MatMul":
            continue
        seen.add(one)
        table = node.inputs[0] if node.op_type == "Gather" else None
        if is_constant(table) and table is not None and element_type(table).kind in "fV" and len(shape_of(table)) == 2:
            return True
        left.extend(node.inputs)
    return False


def _product_of(shares: ir.Value) -> ir.Node | None:
    """Return the node that multiplies the attention weights `shares` by the values; None if there is none."""
    seen, left = set[ir.Node](), [shares]
    while left:
        for use in left.pop().uses():
            if use.node.op_type == "MatMul" and use.idx == 0:
                return use.node
            if use.node.op_type in _BEHIND and use.node not in seen:
                seen.add(use.node)
                left.extend(use.node.outputs)
    return None
