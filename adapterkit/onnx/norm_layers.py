"""Find the norms that an adapter changes: nodes that scale channels by a vector, such as a LayerNorm or an RMSNorm.

A norm's node itself multiplies by the vector, so an adapter must change the vector before the node reads it: new nodes
before the norm compute the changed vector (see inside.py). If several norms have equal vectors, some exporters store
them as one tensor. Therefore, a norm is found by the name of its node. The name of its vector is used only if no other
node reads the vector.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from ..core.adapter import Adapter, Target
from ..errors import USE_EXPORTED_BASE, USE_ITS_BASE, ShapeMismatch, TargetNotFound, Unsupported
from ..io.lazy import as_array
from ..naming.moves import NamesByEnd, same_end
from .building import Branch
from .layers import GraphLayer, only_reader, weight_at
from .modules import SCOPES, dotted, listed
from .operands import is_constant, nodes_of, numbers, shape_of, sources
from .resolved import ResolvedTarget, Spot

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint

MICROSOFT = "com.microsoft"

_NODE = re.compile(
    r"/(?:(?:Skip)?(?:Simplified)?LayerNormalization|LayerNorm|RMSNormalization|SkipLayerNorm|Mul)(?:_\d+)?$"
)

_CALL = re.compile(r"_\d+$")

STATISTICS = {"ReduceMean", "ReduceSum", "LpNormalization"}
"""Operators that compute statistics. If a module contains such an operator and a Mul by a constant vector, the Mul is
the scale of a norm."""


class NormLayer(GraphLayer):
    """A node that normalizes, scales and shifts."""

    inside = True
    axes = (1,)
    operators: ClassVar[tuple[tuple[str, str], ...]] = (("", "LayerNormalization"), ("", "GroupNormalization"))
    vector: ClassVar[int | None] = 2

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        domain = "" if node.domain == "ai.onnx" else node.domain
        if (domain, node.op_type) not in cls.operators or len(node.inputs) <= cls.position:
            return False
        weight = weight_at(node, cls.position)
        return weight is not None and is_constant(weight) and len(shape_of(weight)) == 1

    @classmethod
    def turns(cls, node: ir.Node) -> bool:
        return False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored_shape(self.node)


class RMSNorm(NormLayer):
    """A node that divides by the root mean square, and scales."""

    operators = (
        ("", "RMSNormalization"),
        ("", "SimplifiedLayerNormalization"),
        (MICROSOFT, "SimplifiedLayerNormalization"),
    )
    vector = None


class SkipNorm(NormLayer):
    """A LayerNorm of a sum: onnxruntime's optimizer fuses the Add and the LayerNorm into one node."""

    operators = ((MICROSOFT, "SkipLayerNormalization"),)
    position, vector = 2, 3


class SkipRMSNorm(NormLayer):
    """An RMSNorm of a sum, fused with the Add like `SkipNorm`."""

    operators = ((MICROSOFT, "SkipSimplifiedLayerNormalization"),)
    position, vector = 2, None


class ScaledNorm(NormLayer):
    """A Mul node that multiplies by a norm's weight, in graphs that compute the norm with several nodes."""

    operators = (("", "Mul"),)
    vector = None

    def __init__(self, node: ir.Node, branch: Branch) -> None:
        super().__init__(node, branch)
        self.after = self._added()

    @property
    def read(self) -> ir.Value:
        data_input = self.node.inputs[1 - self.position]
        assert data_input is not None
        return data_input

    def _added(self) -> tuple[ir.Node, ir.Value] | None:
        y = self.node.outputs[0]
        add = only_reader(y, "Add")
        b = None if add is None else weight_at(add, 1 - list(add.inputs).index(y))
        if add is None or b is None or not is_constant(b) or shape_of(b) != self.shape:
            return None
        return (add, b) if _module(add) == _module(self.node) else None


class LeftScaledNorm(ScaledNorm):
    """A `ScaledNorm` whose weight is the first input of the Mul."""

    position = 0


NORMS: tuple[type[NormLayer], ...] = (NormLayer, RMSNorm, SkipNorm, SkipRMSNorm, ScaledNorm, LeftScaledNorm)

UNSHIFTED = (RMSNorm, SkipRMSNorm, ScaledNorm, LeftScaledNorm)
"""Kinds of norms whose vector in the graph may be `1 + weight`. Only the base's weight shows whether it is."""


def _module(node: ir.Node) -> str:
    """Return the name of the module that contains a node, from the metadata or the node's name; "" if unknown."""
    scopes = listed(node.metadata_props.get(SCOPES))[-2:-1]
    if scopes:
        return scopes[0]
    name = node.name or ""
    return dotted(name.rpartition("/")[0]) if name.startswith("/") and _NODE.search(name) else ""


def norms_of(model: ir.Model) -> dict[str, list[Spot]]:
    """Find the norms of a graph. Return the nodes that apply each norm's vector, keyed by the norm's module name."""
    nodes = list(nodes_of(model))
    computing = {_inside(node) for node in nodes if node.op_type in STATISTICS}
    spots_by_module: dict[str, list[Spot]] = {}
    for node in nodes:
        kind = next((kind for kind in NORMS if kind.takes(node)), None)
        if kind is None:
            continue
        stored, module = tuple(sources(kind.operand_of(node))), _module(node)
        if issubclass(kind, ScaledNorm) and (not module or module not in computing):
            continue
        if not listed(node.metadata_props.get(SCOPES)):
            module = _whole_name(module, _named(stored))
        if module:
            spot = Spot(node, kind, {"path": (f"{module}.weight",)}, kind.stored_shape(node), stored)
            spots_by_module.setdefault(module, []).append(spot)
    # A node of `norm_1` that reads the same vector as `norm` is a later call of `norm`.
    for name, spots in list(spots_by_module.items()):
        first = spots_by_module.get(_CALL.sub("", name), spots)
        if first is not spots and first[0].sources == spots[0].sources:
            first += spots
    return spots_by_module


def _whole_name(module: str, named: str) -> str:
    """Return a norm's module name, given the names from its node and from its weight; either may be empty.

    torch's older exporter omits modules that are not called, such as a ModuleDict, from a node's name, and then adds a
    number to equal names. So `norm` may be the name of `down.norm`, and `norm_1` that of `norm`.
    """
    agree = any(same_end(named, name) for name in (module, _CALL.sub("", module)))
    return named if not module or (named and agree) else module


def _inside(node: ir.Node) -> str:
    scopes = listed(node.metadata_props.get(SCOPES))[-2:-1]
    return scopes[0] if scopes else dotted((node.name or "").rpartition("/")[0])


def _named(stored: Sequence[ir.Value]) -> str:
    """Return a norm's module name from the name of its weight; empty if another node also reads the weight."""
    if len(stored) != 1 or len(list(stored[0].uses())) != 1:
        return ""
    name = stored[0].name or ""
    return name.removesuffix(".weight") if name.endswith(".weight") else ""


def norms_at(
    model: ir.Model, adapter: Adapter, others: Mapping[str, Any], base: Checkpoint | None, role: str | None = None
) -> dict[Target, ResolvedTarget]:
    """Return the adapter's targets that are norms, with their nodes in the graph.

    Args:
        model: the graph.
        adapter: the adapter.
        others: a map whose keys are the names of the weights of layers that are not norms; targets with these names are
            skipped.
        base: the weights that the graph was exported from.
        role: the part of the model that the graph holds, such as `encoder`, according to the graph's file name.

    Raises:
        ShapeMismatch: an update and its norm have different numbers of channels.
        TargetNotFound: a norm's vector differs from the base's weight.
        Unsupported: the graph stores the vector as `1 + weight`; or it may do so, and there is no base weight to
            compare with.
    """
    names_of_others = NamesByEnd(others)
    wanted = [
        target for target, updates in adapter.updates.items()
        if all(update.kind in ("additive", "weight") for update in updates) and not target.rows and not target.stacked
        and not names_of_others.of(f"{target.path}.weight")
    ]  # fmt: skip
    norms = norms_of(model) if wanted else {}
    places: dict[Target, ResolvedTarget] = {}
    for target in wanted:
        names = [target.path] if target.path in norms else [name for name in norms if _is_same(name, target.path, role)]
        if len(names) == 1:
            places[target] = _resolved(target, names[0], norms[names[0]], adapter.updates[target], base)
    return places


def _is_same(name: str, path: str, role: str | None) -> bool:
    """Whether a norm's name and a target's path are equal, except for a prefix.

    The prefix may contain `encoder` only if `role` is `encoder`, and `decoder` only if `role` is `decoder`. If a graph
    contains only one of these parts, its names do not contain `encoder` or `decoder`, so only the file's name shows
    which part the graph contains.
    """
    if not same_end(name, path):
        return False
    prefix = path.removesuffix(name) if len(path) > len(name) else name.removesuffix(path)
    return not ({"encoder", "decoder"} - {role}) & {*prefix.split(".")}


def _resolved(
    target: Target, name: str, spots: Sequence[Spot], updates: tuple[Any, ...], base: Checkpoint | None
) -> ResolvedTarget:
    sizes = {int(leaf.shape[0]) for update in updates for leaf in update.tensors.values() if len(leaf.shape) == 1}
    if any(spot.shape != spots[0].shape for spot in spots) or sizes - {spots[0].shape[0]}:
        why = f"the updates have {sorted(sizes)} channels, but the norm has {spots[0].shape[0]}"
        raise ShapeMismatch(why, where=str(target), cure=USE_ITS_BASE)
    _check_numbers(target, spots, base)
    path = replace(target, path=name, layout="out *in")
    return ResolvedTarget(path, target, updates, tuple(spots), "path", 1.0)


def _check_numbers(target: Target, spots: Sequence[Spot], base: Checkpoint | None) -> None:
    """Compare a norm's vector with the base's weight, because some exporters store `1 + weight`."""
    full_name = f"{target.path}.weight"
    name = full_name if base is not None and full_name in base.tensors else None
    if base is not None and name is None:
        name = next((other for other in base.tensors if same_end(other, full_name)), None)
    if base is None or name is None:
        if any(issubclass(spot.kind, UNSHIFTED) for spot in spots):
            why = "the graph may store this norm's weight as 1 + weight"
            cure = "Pass the base's weights, to compare the norm with them: --base-weights DIR (base_weights=)"
            raise Unsupported(why, where=str(target), cure=cure)
        return
    stored = as_array(base.tensors[name]).astype(np.float64)
    for spot in spots:
        stored_now = numbers(spot.kind.operand_of(spot.node)).astype(np.float64)
        if np.allclose(stored_now, stored, rtol=1e-2, atol=1e-3):
            continue
        if np.allclose(stored_now, 1 + stored, rtol=1e-2, atol=1e-3):
            cure = "Merge the adapter into the base (`adapterkit merge`), and export the result"
            raise Unsupported("the graph stores this norm's weight as 1 + weight", where=str(target), cure=cure)
        why = "the norm's weight differs from the base's weight"
        raise TargetNotFound(why, where=str(target), cure=USE_EXPORTED_BASE)
