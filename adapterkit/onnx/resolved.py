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
"""The methods that find a layer's name, in the order in which they are tried. The name comes from:

- `scopes`: the exporter's metadata about the node's module.
- `folded_from`: the exporter's metadata about the parameters that were folded into the stored tensor.
- `initializer`: the stored tensor's name.
- `path`: the node's name.
- `heads`: the name of a layer that computes queries, keys and values together. The head counts of the attention
  module, or the sizes of a Split, show which rows belong to the queries, to the keys and to the values.
- `values`: a base weight with values equal to the layer's weight.
- `packed`: a base weight with values equal to some rows of the weight of a layer that combines several base layers.
- `nearest`: the base weight with the nearest values; see `NEAR` and `APART`.
"""

NEAR = 0.15
"""The largest relative distance (in the Frobenius norm) at which a weight of the graph is accepted as a rounded copy of
a weight of the base."""

APART = 3.0
"""The smallest accepted ratio of two distances: the distance of the second nearest candidate, divided by the distance
of the nearest candidate. If the ratio is smaller, the nearest candidate is not accepted."""


@dataclass(frozen=True, slots=True, eq=False)
class Spot:
    """One call of a layer in a graph: the node that computes the layer's output.

    Attributes:
        node: the node.
        kind: the kind of layer.
        names: a map from each method in `METHODS` to the names that it found for the layer's weight, such as
            `fc.weight`.
        shape: the weight's shape in the layout of the adapters' formulas, `[out, in, *k]`.
        sources: the stored tensors that the node's weight is computed from.
        rows: if the node computes several layers together, the range of the node's outputs that belong to this layer.
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
    """Return the relative distance between W and a layer's weight.

    If the transposed weight is nearer to W, return the distance between W and the transposed weight. If W has neither
    the weight's shape nor the transposed weight's shape, return None.
    """
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
        scale: `[out]`, float64; `gamma / sqrt(var + eps)` for a norm, the stored values for a scale.
        shift: `[out]`, float64; `beta - scale * mean` for a norm, zeros for a scale.
        weight: the base's weight in the layout of the adapters' formulas, `[out, in, *k]`, float64.
        bias: the bias of the base's layer, `[out]`, float64; None if the layer has none.
        kind: `batch norm` or `scale`, for messages.
        is_rounded: whether the graph stores the layer's weight in quantized form. If so, updates are computed with the
            base's weight, even after a merge has dequantized the graph's weight.
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
            groups: for a transposed convolution, the number of groups; the result then broadcasts with a weight
                `[out / groups, in, *k]`. For other layers, 1.
        """
        rest = self.weight.ndim - 2
        if groups == 1:
            return self.scale.reshape(-1, *[1] * (rest + 1))
        each = np.repeat(self.scale.reshape(groups, -1).T, self.weight.shape[1] // groups, axis=1)
        return each.reshape(*each.shape, *[1] * rest)


@dataclass(frozen=True, slots=True, eq=False)
class BaseBias:
    """The bias that a target's layer has in the base.

    Attributes:
        numbers: the bias, `[out]`, float32; None if the layer has none.
        others: all other floating-point vectors in the base's files, by name.
    """

    numbers: Array | None
    others: Mapping[str, Leaf]


@dataclass(frozen=True, slots=True, eq=False)
class ResolvedTarget:
    """An adapter's target, resolved to layers of a graph or to a module without a weight.

    Attributes:
        target: the target under the name that it has in the graph. The target's layout is `out *in`, except for a stack
            of experts.
        asked: the target under the name that it has in the adapter.
        updates: the updates at the target.
        spots: the target's layers, one for each call of the module.
        method: the method that found the layers, one of `METHODS`.
        confidence: always 1. `mapping.Place` has lower values for layers that match the base only approximately.
        turned: whether the updates apply to the weight with its first two axes swapped.
        outlet: the output site, or None. If the target is a module without a weight, `outlet` is always set, and
            `spots` is empty. If the target is a layer, `outlet` is set only if the updates also read a residual or a
            norm.
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
        """The names of the nodes of all layers in `spots`.

        For a module without a weight, the list has the name of the node that computes the module's output.
        """
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
    """Apply a target's updates, one after the other, to a weight and a bias; return the new weight and bias."""
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
