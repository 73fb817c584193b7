"""List the layers of a graph, with their names and how each name was found."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.arguments import checks_types
from ..errors import TargetNotFound, places_errors
from ..io.checkpoint import opened as opened_base
from ..io.lazy import as_array
from ..naming.moves import same_end
from .matching import StoredWeights, nearest
from .model_file import opened
from .resolved import METHODS, NEAR, Known, Spot, distance
from .resolving import NUMBERED, OF_MODULES, by_name, plain_call, spots_of, with_several_weights
from .unblocking import unblock

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from ..io.strict_json import JsonValue
    from .reading import Base, Model


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A layer of a graph, with all nodes that call it.

    Attributes:
        target: the layer's name, to be used as an adapter's target; None if the graph does not show a name.
        spots: one spot for each node that calls the layer.
        method: how the name was found, one of `METHODS`; None if no name was found.
        confidence: 1 minus the relative distance from the base's weight. For a layer that was not compared with a
            weight: 1 if it has a name, otherwise 0.
        note: if `spots` is empty, the reason why no node was found for the base's weight; otherwise None.
    """

    target: str | None
    spots: tuple[Spot, ...]
    method: str | None
    confidence: float
    note: str | None = None

    def record(self) -> dict[str, JsonValue]:
        """Return the layer as a dictionary that JSON can store."""
        first = self.spots[0] if self.spots else None
        return {
            "target": self.target, "method": self.method, "confidence": round(self.confidence, 4), "note": self.note,
            "nodes": [spot.node.name for spot in self.spots],
            "operators": sorted({spot.node.op_type for spot in self.spots}),
            "values": sorted({source.name or "" for spot in self.spots for source in spot.sources}),
            "shape": None if first is None else list(first.shape),
        }  # fmt: skip


@checks_types
@places_errors
def layers(model: Model, *, base_weights: Base | None = None) -> list[Place]:
    """Return all layers of a graph that an adapter can change, each with its name and how the name was found.

    Args:
        model: an ONNX file, or an in-memory model.
        base_weights: the weights of the model that the graph was exported from. If passed, the function searches the
            graph for each of these weights (except vectors), first by name, then by values. A layer with the right name
            is accepted only if its weight is close to the base's weight.

    Returns:
        the layers in the order of the graph; with `base_weights`, first the base's layers in the base's order, then all
        other layers of the graph.

    Raises:
        Malformed, StorageError: as in `inject`.
    """
    graph, base = opened(model).model, None if base_weights is None else opened_base(base_weights)
    unblock(graph, base)
    spots = spots_of(graph)
    if base is None:
        return _named(spots)
    known, places, weights = by_name(spots), list[Place](), StoredWeights(spots)
    for name, tensor in base.tensors.items():
        # Skip vectors, which are norms and biases.
        if len(tensor.shape) > 1 and tensor.dtype.floating:
            places.append(_looked_for(name, base, known, weights))
    seen = {id(spot.node) for place in places for spot in place.spots}
    return [*places, *_named([spot for spot in spots if id(spot.node) not in seen])]


def _named(spots: Sequence[Spot]) -> list[Place]:
    """Group the nodes that call the same layer: nodes with the same name that read the same tensors."""
    groups: dict[tuple[str | None, str | None, Any], list[Spot]] = {}
    several = with_several_weights(spots)
    for spot in spots:
        method, name = _best(spot, several)
        # If a model calls a module twice, exporters append a number to the second node's name: `qkv_proj_1`.
        first = (plain_call(name), method, spot.sources) if name is not None and method == "path" else None
        key = first if first in groups else (name, method, spot.sources)
        groups.setdefault(key, []).append(spot)
    return [
        Place(name, tuple(same), method, float(name is not None)) for (name, method, _), same in groups.items()
    ]  # fmt: skip


def _best(spot: Spot, several: Container[str]) -> tuple[str | None, str | None]:
    """Return the method that found a layer's name, and the name.

    Prefer names that end with `.weight`, because the rest of such a name is a module's name.
    """
    names_by_method = [
        (method, name) for method in METHODS for name in spot.names.get(method, ())
        if method not in OF_MODULES or name not in several
    ]  # fmt: skip
    weights = [(method, name.removesuffix(".weight")) for method, name in names_by_method if name.endswith(".weight")]
    scoped = [(method, name) for method, name in names_by_method if not NUMBERED.match(name)]
    return next(iter([*weights, *scoped]), (None, None))


def _looked_for(name: str, base: Checkpoint, known: Known, weights: StoredWeights) -> Place:
    target, W = name.removesuffix(".weight"), as_array(base.tensors[name]).astype("f4")
    exact = next((at for other, at in known.items() if same_end(other, name)), None)
    if exact is not None:
        far = distance(W, exact[1][0])
        if far is not None and far <= NEAR:
            return Place(target, tuple(exact[1]), exact[0], 1 - far)
    try:
        method, same = nearest(W, weights, target)
    except TargetNotFound as error:
        return Place(target, (), None, 0.0, error.why)
    return Place(target, tuple(same), method, 1 - (distance(W, same[0]) or 0.0))
