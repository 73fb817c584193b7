"""Types for a graph's layers, for norms that are folded into layers, and for an adapter's targets in a graph.

The module `resolving` creates these objects, with the help of `heads`, `norms`, `matching`, `packed` and `tying`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..io.lazy import as_array
from .values import computed_over

if TYPE_CHECKING:
    from ..core.adapter import Target
    from ..core.updates import Update
    from ..io.lazy import Leaf
    from ..io.strict_json import JsonValue
    from .building import Array
    from .layers import GraphLayer
    from .outlets import Outlet

METHODS = ("scopes", "folded_from", "initializer", "path", "heads", "values", "packed", "nearest")
"""The methods that find a layer's name, in the order in which they are tried.

- `scopes`: the exporter's metadata about the module of the node.
- `folded_from`: the exporter's metadata about a folded parameter.
- `initializer`: the name of the stored tensor.
- `path`: the name of the node.
- `heads`: the head counts of the attention that reads a packed layer.
- `values`: a base weight with equal values.
- `packed`: a base weight whose values equal some rows of a weight that packs several layers.
- `nearest`: the base weight with the nearest values.
"""

NEAR = 0.15
"""Largest relative distance, in the Frobenius norm, between a base weight and its rounded copy in the graph."""

APART = 3.0
"""How many times as far away as the nearest candidate the second nearest must be, for the nearest to be accepted."""


@dataclass(frozen=True, slots=True, eq=False)
class Spot:
    """A layer at a node of a graph.

    Attributes:
        node: the node.
        kind: the kind of layer.
        names: a map from each method in `METHODS` to the names that it found for the layer's weight, such as
            `fc.weight`.
        shape: the weight's shape as the methods' formulas get it, `[out, in, *k]`.
        sources: the stored tensors that the node's weight is computed from.
        rows: if the node packs several layers, the range of the node's outputs that belong to this layer.
    """

    node: ir.Node
    kind: type[GraphLayer]
    names: Mapping[str, tuple[str, ...]]
    shape: tuple[int, ...]
    sources: tuple[ir.Value, ...]
    rows: tuple[int, int] | None = None


Known = dict[str, tuple[str, list[Spot]]]
"""A map from each weight's name to a pair: the method that found the name, and all layers with that name."""


def distance(W: Array, spot: Spot) -> float | None:
    """Return the relative distance between W and a layer's weight or its transpose; None if the shapes differ."""
    turned = (spot.shape[1], spot.shape[0], *spot.shape[2:])
    if W.shape not in (spot.shape, turned):
        return None
    weight = spot.kind.stored_array(spot.node).astype(np.float32)
    size = max(float(np.linalg.norm(W)), 1e-30)
    ways = [V for V in (weight, weight.swapaxes(0, 1)) if V.shape == W.shape]
    return min(float(np.linalg.norm(V - W)) / size for V in ways)


@dataclass(frozen=True, slots=True, eq=False)
class FoldedNorm:
    """A batch normalisation or a scale that is folded into a layer of the graph.

    If the base's layer computes `y`, the graph's layer computes `scale * y + shift`.

    Attributes:
        name: the name of the norm or of the scale in the base.
        scale: `gamma / sqrt(var + eps)` for a norm, the stored values for a scale, `[out]`, float64.
        shift: `beta - scale * mean` for a norm, zeros for a scale, `[out]`, float64.
        weight: the base's weight as the methods' formulas get it, `[out, in, *k]`, float64.
        bias: the bias of the base's layer, `[out]`, float64; None if the layer has none.
        kind: the word for the norm or the scale in messages.
        is_rounded: whether the graph stores the layer's weight in few bits. If so, updates are computed with the base's
            weight, even after a merge has dequantized the graph's weight.
    """

    name: str
    scale: Array
    shift: Array
    weight: Array
    bias: Array | None
    kind: str = "batch norm"
    is_rounded: bool = False

    def factors(self, groups: int) -> Array:
        """Return the scale in a shape that broadcasts with a weight `[out, in, *k]`.

        Args:
            groups: the number of groups of a transposed convolution, whose weight has `out / groups` outputs for each
                input; 1 for other layers.
        """
        rest = self.weight.ndim - 2
        if groups == 1:
            return self.scale.reshape(-1, *[1] * (rest + 1))
        each = np.repeat(self.scale.reshape(groups, -1).T, self.weight.shape[1] // groups, axis=1)
        return each.reshape(*each.shape, *[1] * rest)


@dataclass(frozen=True, slots=True, eq=False)
class BaseBias:
    """The bias of a target's layer in the base.

    Attributes:
        numbers: the bias, float32; None if the layer has none.
        others: all other vectors in the base's files, by name.
    """

    numbers: Array | None
    others: Mapping[str, Leaf]


@dataclass(frozen=True, slots=True, eq=False)
class ResolvedTarget:
    """An adapter's target, and the layers or the module of a graph to which it belongs.

    Attributes:
        target: the target with its name in the graph. The layout is `out *in`, except for a stack of experts.
        asked: the target with its name in the adapter.
        updates: the updates at the target.
        spots: the target's layers, one for each call of the module.
        method: the method that found the layers, one of `METHODS`.
        confidence: 1 if found by name or by equal values; if found by the nearest values, 1 minus the relative
            distance.
        turned: whether the updates apply to the weight with its first two axes swapped.
        outlet: the output site of a module without a weight, which has no layers in `spots`. A layer has an outlet only
            if its updates also read a residual or a norm.
        norm: the batch normalisation or the scale that an exporter or optimizer folded into the layer.
        bias: the layer's bias in the base; None if it is unknown.
    """

    target: Target
    asked: Target
    updates: tuple[Any, ...]
    spots: tuple[Spot, ...]
    method: str
    confidence: float
    turned: bool = False
    outlet: Outlet | None = None
    norm: FoldedNorm | None = None
    bias: BaseBias | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, `[out, in, *k]`; for a module without a weight, `(channels, channels)`."""
        if self.spots:
            return self.spots[0].shape
        return (next((update.channels for update in self.updates if update.channels is not None), 0),) * 2

    @property
    def last(self) -> ir.Node | None:
        """The node of the target's first layer; for a module without a weight, the node that computes its output."""
        if self.spots:
            return self.spots[0].node
        return None if self.outlet is None or self.outlet.end is None else self.outlet.end.producer()

    @property
    def nodes(self) -> list[str]:
        """The names of the nodes of all layers in `spots`; for a module without a weight, the name of its last node."""
        return [spot.node.name or "" for spot in self.spots] or [(self.last and self.last.name) or ""]

    def record(self) -> dict[str, JsonValue]:
        """Return the target as a dictionary that can be written as JSON."""
        return {
            "target": str(self.asked), "name": self.target.path, "nodes": self.nodes,
            "weight": sorted({source.name or "" for spot in self.spots for source in spot.sources}),
            "method": self.method, "confidence": round(self.confidence, 4),
            **({"folded_norm": self.norm.name} if self.norm is not None else {}),
        }  # fmt: skip


def through(place: ResolvedTarget, W: Any, b: Any = None) -> tuple[Any, Any]:
    """Apply a target's updates in order to a weight and a bias; return both."""
    for update in place.updates:
        loaded = wide(update)
        loaded = loaded.settled(W) if b is not None and loaded.bias_sees_weight else loaded
        b = loaded.new_bias(b) if b is not None else b
        W = loaded.new_weight(W) if W is not None and loaded.changes_weight else W
    return W, b


def wide(update: Update) -> Update:
    """Return an update with its floating-point tensors in float64; integers and booleans keep their dtype."""

    def wide(leaf: Leaf) -> Array:
        array = as_array(leaf)
        return array if array.dtype.kind in "iub" else array.astype(np.float64)

    return computed_over(update, wide)
