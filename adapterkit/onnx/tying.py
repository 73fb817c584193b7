"""Find a graph's tied layers (an embedding and a head with equal weights). Find out which of them an adapter changes.

Exporters store a tied tensor once, or store a transposed copy for the head. So in the graph, equal values are the only
sign of a tie. `merging.ties` decides which tied layers each update changes, as it does for merges into model folders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.adapter import Adapter
from ..errors import UsageError
from ..merging.planned_update import PlannedUpdate
from ..merging.ties import acting, parse_tied
from ..naming.ties import Tie, says_tied, says_untied, tie_of
from .building import Array
from .packed import is_packed
from .reading import known_config
from .resolved import METHODS, NEAR, ResolvedTarget, Spot
from .roles import role_of

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Tying:
    """Information about a graph's tied layers that the graph itself does not contain.

    Attributes:
        tied: the caller's choice, as `parse_tied` returns it. If `tied` is None, each update changes the same
            tied layers as in the tool that trained the adapter.
        config: the config of the exported model, if there is one.
        role: the model's component in the graph, such as `encoder`; None if the graph's file name does not show it.
        warnings: a list to which a warning is added for each omitted update.
    """

    tied: str | None = None
    config: Mapping[str, Any] | None = None
    role: str | None = None
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, base: Checkpoint | None, path: Path | None, tied: str | Mapping[str, str] | None = None) -> Tying:
        """Create a `Tying` with the base's config. If the base has no config, read the one in the graph's folder.

        Raises:
            UsageError: `tied` is not a valid choice.
        """
        return cls(parse_tied(tied), known_config(base, path), None if path is None else role_of(Path(path.name)))


def with_tied(
    places: Sequence[ResolvedTarget], adapter: Adapter, spots: Sequence[Spot], tying: Tying
) -> list[ResolvedTarget]:
    """Return the targets that an adapter changes in a graph, including tied layers that the adapter does not name.

    Args:
        places: the adapter's targets, resolved in the graph.
        adapter: the adapter, whose recipe shows which tool trained it.
        spots: all layers of the graph.
        tying: the caller's choice, and the base's config.

    Raises:
        UsageError: neither the adapter nor the caller's choice shows which of the tied layers an update changes.
    """
    # If the config says that no layers are tied, trust it: layers with equal values are not always tied.
    if says_untied(tying.config):
        return list(places)
    for group in _groups(spots, [spot for place in places if _may_be_tied(place) for spot in place.spots]):
        places = _with_group(places, adapter, group, tying)
    return list(places)


@dataclass(frozen=True, slots=True)
class _TiedLayers:
    """Layers with equal or almost equal weights.

    Attributes:
        lookups: embeddings, which look up tokens.
        heads: linear layers whose weight is the table of the embeddings.
        proven: True if the weights are equal; False if a layer is quantized and the weights are only close.
    """

    lookups: tuple[Spot, ...]
    heads: tuple[Spot, ...]
    proven: bool


def _groups(spots: Sequence[Spot], changed: Sequence[Spot]) -> list[_TiedLayers]:
    """Return the groups of tied layers that contain at least one changed layer."""
    flat = [spot for spot in spots if len(spot.shape) == 2 and spot.rows is None]
    lookups = [spot for spot in flat if _is_lookup(spot)]
    heads = [spot for spot in flat if not _is_lookup(spot)]
    nodes, groups = {spot.node for spot in changed}, list[_TiedLayers]()
    for lookup in lookups:
        if any(lookup in group.lookups for group in groups):
            continue
        known = [lookup, *(other for other in lookups if other is not lookup and _distance(other, lookup) == 0)]
        sized = [head for head in heads if head.shape == _size(lookup)]
        if not sized or not nodes & {spot.node for spot in (*known, *sized)}:
            continue
        near = {head: distance for head in sized if (distance := _distance(head, lookup)) is not None}
        if near and nodes & {spot.node for spot in (*known, *near)}:
            groups.append(_TiedLayers(tuple(known), tuple(near), not any(near.values())))
    return groups


def _with_group(
    places: Sequence[ResolvedTarget], adapter: Adapter, group: _TiedLayers, tying: Tying
) -> list[ResolvedTarget]:
    """Return `places` after adding and removing targets in one group of tied layers.

    If the updates of a target in the group also change other layers of the group, the result has new targets for these
    layers. If the updates of a target in the group have no effect, the result omits this target.
    """
    nodes = {spot.node for spot in (*group.lookups, *group.heads)}
    named = [place for place in places if _may_be_tied(place) and place.spots[0].node in nodes]
    inputs = _by_layer(group.lookups, named)
    (head, heads), *others = _by_layer(group.heads, named).items()
    layers = {**inputs, head: [*heads, *(spot for _, more in others for spot in more)]}
    stored = next((_name(place) for place in named if _is_lookup(place.spots[0])), next(iter(inputs)))
    tie = tie_of(stored, tuple(inputs), head)
    folds_by_layer: dict[str, list[PlannedUpdate]] = {}
    for place in named:
        folds_by_layer.setdefault(_name(place), []).append(_fold(place))
    changed = acting(tie, folds_by_layer, adapter, tying.tied, tying.warnings)
    added = [each for layer, folds in changed.items() for each in _added(layer, layers[layer], folds, named)]
    if added and tying.tied is None and not (group.proven or says_tied(tying.config)):
        raise _unproven(added[0], tie)
    kept = {fold.target for folds in changed.values() for fold in folds}
    # Drop the targets that `acting` dropped. An example is T5's `shared`: the model does not call this module, so an
    # update of this module had no effect when PEFT trained the adapter.
    return [*(place for place in places if place not in named or _fold(place).target in kept), *added]


def _may_be_tied(place: ResolvedTarget) -> bool:
    weights = [update for update in place.updates if update.kind != "output" and update.changes_weight]
    return bool(weights and place.spots) and len(place.shape) == 2 and place.target.rows is None


def _distance(spot: Spot, other: Spot) -> float | None:
    """Return the relative distance between two layers' tables; None if the layers cannot be tied.

    The layers can be tied if the tables are equal, or if one table is quantized and the distance is at most `NEAR`.
    """
    if _size(spot) != _size(other):
        return None
    if len(spot.sources) == 1 and spot.sources == other.sources:
        return 0.0
    one, two = _table(spot), _table(other)
    if np.array_equal(one, two):
        return 0.0
    distance = float(np.linalg.norm(one - two)) / max(float(np.linalg.norm(two)), 1e-30)
    return distance if distance <= NEAR and (is_packed(spot) or is_packed(other)) else None


def _is_lookup(spot: Spot) -> bool:
    return spot.kind.op_type == "Gather"


def _size(spot: Spot) -> tuple[int, ...]:
    return spot.shape[::-1] if _is_lookup(spot) else spot.shape


def _table(spot: Spot) -> Array:
    stored = spot.kind.stored_array(spot.node).astype(np.float32)
    seen = stored.swapaxes(0, 1) if spot.kind.turns(spot.node) else stored
    return seen.T if _is_lookup(spot) else seen


def _by_layer(spots: Sequence[Spot], named: Sequence[ResolvedTarget]) -> dict[str, list[Spot]]:
    """Return a map from the name of each layer's weight to the layer's spots.

    The name comes from the adapter's target for the layer. If the adapter has no such target, the name comes from the
    graph.
    """
    nodes = {spot.node for spot in spots}
    spots_by_name: dict[str, list[Spot]] = {
        _name(place): [] for place in named if place.spots[0].node in nodes and len(place.spots) == 1
    }
    for spot in spots:
        names_placed = (_name(place) for place in named if len(place.spots) == 1 and spot.node is place.spots[0].node)
        names_stated = (name for method in METHODS for name in spot.names.get(method, ()))
        spots_by_name.setdefault(next(names_placed, None) or next(names_stated, spot.node.name or ""), []).append(spot)
    return spots_by_name


def _name(place: ResolvedTarget) -> str:
    return f"{place.target.path}.weight"


def _fold(place: ResolvedTarget) -> PlannedUpdate:
    """Return a target's updates as one planned update of the tied table, which has one row for each token."""
    updates = tuple(update for update in place.updates if update.kind != "output" and update.changes_weight)
    turned = _is_lookup(place.spots[0]) != place.turned
    target = replace(place.target, layout="in out *k" if turned else "out *in")
    return PlannedUpdate(target, updates, 1.0, 0, False, _size(place.spots[0]))


def _added(
    layer: str, spots: list[Spot], folds: Sequence[PlannedUpdate], named: Sequence[ResolvedTarget]
) -> list[ResolvedTarget]:
    """Return new targets at a tied layer, for updates that the adapter has only at another layer of the group."""
    added = []
    for fold in folds:
        place = next(place for place in named if _fold(place).target == fold.target)
        nodes = {spot.node for spot in place.spots}
        new = [spot for spot in spots if spot.node not in nodes]
        if not new:
            continue
        turned = place.turned != (_is_lookup(new[0]) != _is_lookup(place.spots[0]))
        target = replace(place.target, path=layer.removesuffix(".weight"))
        added.append(
            replace(place, target=target, updates=fold.updates, spots=tuple(new), turned=turned, outlet=None)
        )  # fmt: skip
    return added


def _unproven(place: ResolvedTarget, tie: Tie) -> UsageError:
    why = (
        f"the weights of {tie.head} and {tie.stored} are almost equal, and one of them is quantized: "
        f"if these two layers are tied, the update at {place.asked} changes both; if not, it changes only one of them"
    )
    cure = (
        "Pass the base's folder: --base-weights DIR (base_weights=DIR). Its config.json shows whether the layers are "
        'tied. Or choose: --tied merge (tied="merge") changes both layers; --tied '
        "rows=untie,embedding=untie,head=untie,replacement=untie changes only the layer that the adapter names"
    )
    return UsageError(why, where=str(place.asked), cure=cure)
