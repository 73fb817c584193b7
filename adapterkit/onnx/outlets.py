"""Find output sites: a target's output in a graph, the residual that is added to this output, and the norm of the sum.

Some modules, like BERT's `BertOutput`, add a residual themselves; such a module reads the residual only for this sum.
In other models, the sum is outside the module. In this case, the update names the module whose input is the residual,
and the module that normalises the sum. Sites are found before anything is attached. If a value of a site is replaced
later, `Building.now` returns the new value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import onnx_ir as ir

from ..core.adapter import Target
from ..core.updates import OutputUpdate
from ..errors import Unsupported
from .building import Branch, Copies, Dtype, between, copied
from .modules import Module, module_at
from .operands import attribute, is_constant
from .values import Unsayable, Value, plain

if TYPE_CHECKING:
    from ..core.updates import Update
    from .layers import GraphLayer


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """A normalisation in a graph: its input, its nodes, and its output."""

    start: ir.Value
    nodes: tuple[ir.Node, ...]
    end: ir.Value


@dataclass(frozen=True, slots=True, eq=False)
class Outlet:
    """The output site of a target.

    Attributes:
        end: the target's output; None for a layer, because `GraphLayer.end` is its output.
        read: the target's input, not counting the residual. None for a layer, and for a module that does not have
            exactly one such input.
        residual: the value that is added to the target's output.
        norm: the normalisation of the sum of the output and the residual.
        hidden: the output before the module adds a residual; None if the module does not add one.
        nodes: the nodes of the module, if an update replaces the module's input; else empty.
    """

    end: ir.Value | None = None
    read: ir.Value | None = None
    residual: ir.Value | None = None
    norm: Norm | None = None
    hidden: ir.Value | None = None
    nodes: tuple[ir.Node, ...] = ()


def outlet(model: ir.Model, target: Target, updates: Sequence[Update], is_layer: bool) -> Outlet | None:
    """Return the output site of a target; None for a layer whose updates name neither a residual nor a norm.

    Raises:
        TargetNotFound: the graph does not have the module, or a module that an update names.
        Unsupported: the updates name different residuals or norms; a named module does not have exactly one input; a
            module named as the norm does not have exactly one output; or the updates name a norm, but `whole` is
            false for one of them.
    """
    where = str(target)
    outer = [update for update in updates if isinstance(update, OutputUpdate)]
    placed = [update for update in outer if update.placed]
    named = {(update.attributes.get("residual", ""), update.attributes.get("norm", "")) for update in placed}
    if len(named) > 1:
        cure = "Put each update into a separate adapter, or change the order of the updates"
        raise Unsupported("updates of the same target differ in `residual` or in `norm`", where=where, cure=cure)
    residual, norm = next(iter(named), ("", ""))
    if norm and not all(update.whole for update in placed):
        why = "the block around the target normalises the output, so the norm cannot be omitted"
        raise Unsupported(why, where=where, cure="Set original_ln_after, or target the block")
    reads = _read(model, target, residual, where) if residual else None
    through = _norm(model, target, norm, where) if norm else None
    if is_layer:
        return Outlet(residual=reads, norm=through) if residual or norm else None
    module = module_at(model, target.path, where)
    channels = next((update.channels for update in outer if update.channels is not None), None)
    end = module.given(channels, where)
    own_outlet = _residual_outlet(module, end) if named == {("", "")} else None
    result = own_outlet or Outlet(end, module.read, reads, through)
    if not any(update.moves_input for update in outer):
        return result
    return replace(result, read=module.fed(channels, where), nodes=module.nodes)


def _read(model: ir.Model, target: Target, path: str, where: str) -> ir.Value:
    module = module_at(model, _beside(target, path), where)
    if module.read is None:
        why = f"the residual is the input of {module.path}, but this module has {len(module.entering)} inputs, not one"
        raise Unsupported(why, where=where, cure="Correct the update's `residual`")
    return module.read


def _norm(model: ir.Model, target: Target, path: str, where: str) -> Norm:
    module = module_at(model, _beside(target, path), where)
    if module.read is None or len(module.leaving) != 1:
        why = f"the module {module.path} must read exactly one value and return exactly one value"
        raise Unsupported(why, where=where, cure="Correct the update's `norm`")
    return Norm(module.read, module.nodes, module.leaving[0])


def _beside(target: Target, path: str) -> str:
    parent = target.path.rpartition(".")[0]
    return f"{parent}.{path}" if parent else path


def _residual_outlet(module: Module, end: ir.Value) -> Outlet | None:
    """Return the output site of a module that ends with a residual sum or with a norm of this sum; else None."""
    sums = [(node, at) for node in module.nodes for at in (0, 1) if _adds(module, node, at)]
    if len(sums) != 1:
        return None
    (node, at) = sums[0]
    total = node.outputs[0]
    through = between(total, end, module.nodes)
    # A node that reads a constant matrix is a layer, not a norm. If the sum is followed by a layer, return None.
    if any(len(one.shape or ()) > 1 and is_constant(one) for n in through for one in n.inputs if one is not None):
        return None
    read = [value for value in module.entering if value is not node.inputs[at]]
    norm = Norm(total, tuple(through), end) if through else None
    return Outlet(end, read[0] if len(read) == 1 else None, node.inputs[at], norm, node.inputs[1 - at])


def _adds(module: Module, node: ir.Node, at: int) -> bool:
    """Whether input `at` of an Add is a residual.

    A residual comes from outside of the module, and no other node of the module reads it. The module computes the
    Add's other input.
    """
    if node.op_type != "Add" or node.domain not in ("", "ai.onnx"):
        return False
    given, other = node.inputs[at], node.inputs[1 - at]
    only = given in module.entering and sum(use.node in module.nodes for use in given.uses()) == 1
    return only and other is not None and other.producer() in module.nodes


class Ended:
    """A target for `OutputUpdate`s: a module, or a layer with a residual or a norm outside of the layer's node.

    Args:
        outlet: the target's output site.
        branch: collects the nodes that formulas append.
        layer: the layer; None for a module.
    """

    direct = True

    def __init__(self, outlet: Outlet, branch: Branch, layer: GraphLayer | None = None) -> None:
        self.outlet, self.branch, self.layer = outlet, branch, layer
        if layer is None:
            assert outlet.end is not None
            self.end = branch.building.now(outlet.end)
            self.y = plain(self.end, self.branch)
            self.x = self._read()
            self.node, self.channel = self.end.producer(), -1
        else:
            self.end, self.y, self.x, self.node, self.channel = layer.end, layer.y, layer.x, layer.node, layer.channel
        self.call: object = None
        self.asked: Value | None = None

    @property
    def moved(self) -> Value | None:
        """The input with which a formula calls the module; None if the formula uses the module's original input."""
        return None if self.asked is self.x else self.asked

    @property
    def dtype(self) -> Dtype:
        return self.y.dtype

    @property
    def weight(self) -> Value | None:
        return None if self.layer is None else self.layer.weight

    @property
    def bias(self) -> Value | None:
        return None if self.layer is None else self.layer.bias

    @property
    def adds_more(self) -> bool:
        """Whether the layer's node adds something other than the layer's bias."""
        return self.layer is not None and self.layer.adds_more

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape; empty for a module."""
        return () if self.layer is None else self.layer.shape

    def __call__(self, x: Value) -> Value:
        if self.layer is not None:
            y: Value = self.layer(x)
            return y
        if x is not self.x and not self.outlet.nodes:
            raise Unsayable("the formula changes the module's input, but the module's nodes read the original input")
        if self.asked is not None and self.asked is not x:
            raise Unsayable("the formula calls the module with two inputs, but the graph calls the module only once")
        self.asked = x
        return self.y

    def hidden(self, x: Value) -> Value:
        y, hidden = self(x), self.outlet.hidden
        return y if hidden is None else plain(self.branch.building.now(hidden), self.branch)

    def residual(self, x: Value) -> Value | None:
        residual = self.outlet.residual
        return None if residual is None else plain(self.branch.building.now(residual), self.branch)

    def norm(self, h: Value) -> Value:
        norm = self.outlet.norm
        if norm is None:
            return h
        building, start = self.branch.building, self.branch.building.now(norm.start)
        copies: Copies = {start: h.value}
        nodes = between(start, norm.end, norm.nodes)
        self.branch.nodes += copied(nodes, copies, lambda name: building.name(f"{self.branch.name}/{name}"))
        return Value(self.branch, h.sizes, h.dtype, copies[norm.end])

    def close(self, h: Value, x: Value, whole: bool = True) -> Value:
        residual = self.residual(x)
        if self.outlet.hidden is not None:
            return self.norm(h + residual) if whole else h
        return h if whole or residual is None else h - residual

    def op(self, x: Value, w: Value) -> Value:
        if self.layer is None:
            raise Unsayable("the formula replaces a weight, but the target is a module without a weight")
        y: Value = self.layer.op(x, w)
        return y

    def zero_padded(self, x: Value, w: Value) -> Value:
        node = None if self.layer is None else self.layer.node
        dilations = attribute(node, "dilations", None) if node is not None and node.op_type == "Conv" else None
        before = None if node is None or node.inputs[0] is None else node.inputs[0].producer()
        if any(size != 1 for size in dilations or ()) or (before is not None and before.op_type == "Pad"):
            raise Unsayable("the graph pads the layer's input with a Pad node, or the kernel is dilated")
        return self.op(x, w)

    def mix(self, h: Value, w: Value) -> Value:
        if self.layer is not None:
            y: Value = self.layer.mix(h, w)
            return y
        return h @ (w if isinstance(w, Value) else h.like(w)).mT

    def per_channel(self, v: Value) -> Value:
        return v if self.layer is None else self.layer.per_channel(v)

    def _read(self) -> Value:
        read = self.outlet.read
        if read is None:
            return _Unread(self.branch, None, self.y.dtype)
        return plain(self.branch.building.now(read), self.branch)


class _Unread(Value):
    """The input of a module that does not read exactly one value. Formulas can pass it on, but not compute with it."""

    __slots__ = ()

    @property
    def value(self) -> ir.Value:
        raise Unsayable("the formula needs the module's input, but the module reads several values or none")
