"""Finds in a graph: the nodes that are layers, norms folded into them, and an adapter's targets at them.

`resolving` finds them; the modules that it asks (`heads`, `norms`, `matching`, `packed`, `tying`) speak of them, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from ..core.adapter import Target
    from .building import Array
    from .layers import Layer
    from .outlets import Outlet

METHODS = ("scopes", "folded_from", "initializer", "path", "heads", "values", "packed", "nearest")
"""How a name was found: the exporter's module scopes, its note of a folded parameter, the stored tensor's name, the
node's name, the head counts of the attention that reads a packed layer, equal numbers, equal rows of a weight that
packs several layers, or the nearest numbers."""

NEAR = 0.15
"""Largest relative distance, in the Frobenius norm, at which a rounded weight counts as the same."""

APART = 3.0
"""How many times farther away the second nearest weight must be."""


@dataclass(frozen=True, slots=True, eq=False)
class Spot:
    """A node that is a layer.

    Attributes:
        node: the node.
        kind: the kind of layer.
        names: method -> names of the node's weight, as in the base, with `weight`.
        shape: the weight's shape as formulas see it, `[out, in, *k]`.
        sources: the stored tensors that the weight is computed from.
        rows: the layer's outputs among the node's, if the node packs several layers.
    """

    node: ir.Node
    kind: type[Layer]
    names: Mapping[str, tuple[str, ...]]
    shape: tuple[int, ...]
    sources: tuple[ir.Value, ...]
    rows: tuple[int, int] | None = None


Known = dict[str, tuple[str, list[Spot]]]
"""Name of a weight -> the method that found it, and its nodes."""


def distance(W: Any, spot: Spot) -> float | None:
    """Return the relative distance between a weight and a layer's, in either orientation; None if shapes differ."""
    turned = (spot.shape[1], spot.shape[0], *spot.shape[2:])
    if W.shape not in (spot.shape, turned):
        return None
    held = spot.kind.held(spot.node).astype(np.float32)
    size = max(float(np.linalg.norm(W)), 1e-30)
    ways = [V for V in (held, held.swapaxes(0, 1)) if V.shape == W.shape]
    return min(float(np.linalg.norm(V - W)) / size for V in ways)


@dataclass(frozen=True, slots=True, eq=False)
class FoldedNorm:
    """A batch normalisation folded into a layer: the graph's output is `scale * y + shift` of the base's `y`.

    Attributes:
        name: the norm's name in the base.
        scale: `gamma / sqrt(var + eps)`, `[out]`, float64.
        shift: `beta - scale * mean`, `[out]`, float64.
        weight: the base's weight as formulas see it, `[out, in, *k]`, float64.
        bias: the base's bias, `[out]`, float64; None if the module has none.
    """

    name: str
    scale: Array
    shift: Array
    weight: Array
    bias: Array | None

    def factors(self, groups: int) -> Array:
        """Return the scale in a shape that multiplies a weight `[out, in, *k]`.

        Args:
            groups: for a transposed convolution, whose weight has `out / groups` outputs for each input.
        """
        rest = self.weight.ndim - 2
        if groups == 1:
            return self.scale.reshape(-1, *[1] * (rest + 1))
        each = np.repeat(self.scale.reshape(groups, -1).T, self.weight.shape[1] // groups, axis=1)
        return each.reshape(*each.shape, *[1] * rest)


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A target in a graph.

    Attributes:
        target: the target under the graph's own name, in the layout `out *in`.
        asked: the target as the adapter names it.
        updates: the updates at the target.
        spots: its nodes, one per call of the module.
        method: how they were found, one of `METHODS`.
        confidence: 1 for names and equal numbers; for the nearest numbers, 1 minus their relative distance.
        turned: True if the updates see the weight with its first two axes swapped.
        outlet: its output site, if that is not the node's output; a module without a weight has no spots.
        norm: the batch normalisation that an exporter folded into it.
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

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape as formulas see it; for a module without a weight, its channels twice."""
        if self.spots:
            return self.spots[0].shape
        return (next((update.channels for update in self.updates if update.channels is not None), 0),) * 2

    @property
    def last(self) -> ir.Node | None:
        """Its node; for a module, the last one."""
        if self.spots:
            return self.spots[0].node
        return None if self.outlet is None or self.outlet.end is None else self.outlet.end.producer()

    @property
    def nodes(self) -> list[str]:
        """The names of its nodes; for a module, of the last one."""
        return [spot.node.name or "" for spot in self.spots] or [(self.last and self.last.name) or ""]

    def record(self) -> dict[str, Any]:
        """Return the same as plain data."""
        return {
            "target": str(self.asked), "name": self.target.path, "nodes": self.nodes,
            "weight": sorted({source.name or "" for spot in self.spots for source in spot.sources}),
            "method": self.method, "confidence": round(self.confidence, 4),
            **({"folded_norm": self.norm.name} if self.norm is not None else {}),
        }  # fmt: skip
