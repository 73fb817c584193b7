"""Find layers by the values of their weights if a graph lacks names, and check layers found by name against the base.

A match is certain if the layer's weight, or a range of its rows, is equal to a base weight. If there is no such layer,
e.g. in a quantized graph, the layer with the nearest weight of the same shape is accepted under two conditions: the
relative distance between this weight and the base weight is at most `NEAR`, and the second nearest weight is at least
`APART` times as far away. `NEAR` accepts a quantized copy of the base weight, but not the same layer's weight from
another checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.adapter import Adapter, Target
from ..errors import USE_EXPORTED_BASE, TargetNotFound
from ..io.lazy import as_array
from ..naming.binding import find_sites
from ..naming.moves import NamesByEnd
from .norms import is_scaled, refuse_folded, scaled_distance, with_norms
from .resolved import APART, NEAR, Known, ResolvedTarget, Spot, distance

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from .building import Array


@dataclass(frozen=True, slots=True)
class _Near:
    distance: float
    spot: Spot


SAMPLE = 1024
"""How many elements of a weight are compared first."""

FAR = 0.9
"""If the relative distance of the compared elements is at least `FAR`, the whole weights are not compared: the distance
of different weights is about 1.4, and that of a rounded copy is at most `NEAR`."""


class StoredWeights:
    """The weights of a graph's layers, in groups of nodes that share a stored weight and count as one candidate.

    A model may have thousands of layers and as many targets, so each target is compared with a sample of each weight
    first. The samples are taken once.
    """

    def __init__(self, spots: Sequence[Spot]) -> None:
        self.spots = spots
        self._groups: dict[Any, list[Spot]] = {}
        for spot in spots:
            self._groups.setdefault((spot.sources, spot.kind), []).append(spot)
        self._samples: dict[tuple[int, ...], tuple[list[list[Spot]], Array]] = {}

    def __iter__(self) -> Iterator[list[Spot]]:
        return iter(self._groups.values())

    def like(self, spot: Spot) -> list[Spot]:
        """Return the nodes that share a node's stored weight."""
        return self._groups[spot.sources, spot.kind]

    def near(self, W: Array) -> list[list[Spot]]:
        """Return the groups whose weights, or transposed weights, may have a distance of less than `FAR` from `W`."""
        if W.shape not in self._samples:
            self._samples[W.shape] = self._sampled(W.shape)
        groups, samples = self._samples[W.shape]
        sample = W[_places(W.shape)]
        close = np.flatnonzero(np.linalg.norm(samples - sample, axis=1) <= FAR * np.linalg.norm(sample))
        return list({id(groups[at]): groups[at] for at in close}.values())

    def _sampled(self, shape: tuple[int, ...]) -> tuple[list[list[Spot]], Array]:
        groups: list[list[Spot]] = []
        samples: list[Array] = []
        places = _places(shape)
        for group in self:
            turned = (group[0].shape[1], group[0].shape[0], *group[0].shape[2:])
            if shape not in (group[0].shape, turned):
                continue
            stored = group[0].kind.stored_array(group[0].node)
            for array in (stored, stored.swapaxes(0, 1)):
                if array.shape == shape:
                    groups.append(group)
                    samples.append(array[places].astype(np.float32))
        return groups, np.stack(samples) if samples else np.zeros((0, SAMPLE), np.float32)


def _places(shape: tuple[int, ...]) -> tuple[Array, ...]:
    """Return the indices of `SAMPLE` random elements, the same for each weight of a shape."""
    rng = np.random.default_rng(0)
    return tuple(rng.integers(0, size, SAMPLE) for size in shape)


def by_values(adapter: Adapter, base: Checkpoint, weights: StoredWeights, error: TargetNotFound) -> Known:
    """Find an adapter's targets in a graph by comparing the weights of the graph's layers with the base's weights.

    Args:
        adapter: the adapter.
        base: the base's weights.
        weights: the weights of the graph's layers.
        error: the error that the search by name raised. It is raised again if the base lacks a target's weight.

    Returns:
        a map from the name of each target's weight to a pair: the method that found the layers, and these layers.

    Raises:
        TargetNotFound: no layer has the values of a target's weight; several different layers are about equally near;
            or several nodes have the weight, and another base weight has equal values.
    """
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    bound = find_sites(adapter, shapes, partial=False, config=base.config)
    known: Known = {}
    names = NamesByEnd(base.tensors)
    for site, asked in zip(bound.sites, bound.origins, strict=True):
        if site.weight is None:
            raise error
        W = _array(base, site.weight)
        # If the base stores a target in parts, use the names of the parts.
        path = asked.path if bound.origins.count(asked) == 1 else site.target.path
        name = f"{path}.weight" if site.weight.endswith(".weight") else path
        try:
            method, matching = nearest(W, weights, str(asked))
        except TargetNotFound:
            # A layer may store the base weight with a norm or scale folded in. Later, `compare` looks up the base
            # weight by the target's name in the adapter. So accept such a layer only if this name identifies the base
            # weight.
            same = _named(base, names, asked)
            scaled = _behind_scale(base, site.weight, W, weights) if same == [site.weight] else []
            if not scaled:
                raise
            method, matching = "nearest", scaled
        # If another base weight has equal values, some of the nodes may belong to this other weight.
        twin = _twin(base, site.weight, W) if len(matching) > 1 else None
        if twin is not None:
            why = (
                f"{len(matching)} nodes have this weight, and the base's {twin} has equal values, so it is unclear "
                "which of the nodes belong to the target"
            )
            raise TargetNotFound(why, where=str(asked), cure="Use a graph that keeps the modules' names")
        known[name] = (method, matching)
    return known


def compare(places: Sequence[ResolvedTarget], base: Checkpoint) -> list[ResolvedTarget]:
    """Check that layers found by name have the base's weights, and find norms that are folded into these layers.

    Returns:
        all targets. If a norm is folded into a target's layer, the target's field `norm` is set.

    Raises:
        TargetNotFound: a layer's weight differs from the base's weight by more than quantization explains.
        Unsupported: a norm may be folded into a layer for which the base has no floating-point weight.
    """
    compared, names = [], NamesByEnd(base.tensors)
    for place in places:
        alike = _named(base, names, place.asked)
        W = base.tensors[alike[0]] if len(alike) == 1 else None
        if place.method in ("values", "packed"):
            compared.append(place)
        elif place.method == "heads" and W is not None and W.dtype.floating:
            _compare_rows(place, _array(base, alike[0]))
            compared.append(place)
        elif W is None or not W.dtype.floating:
            refuse_folded([place])
            compared.append(place)
        else:
            compared.append(with_norms(place, base, alike[0]))
    return compared


def _named(base: Checkpoint, names: NamesByEnd, asked: Target) -> list[str]:
    """Return the names of the base's weights that may be the target's weight."""
    full_name = f"{asked.path}.weight"
    if full_name in base.tensors:
        return [full_name]
    return names.of(full_name)


def _compare_rows(place: ResolvedTarget, W: Array) -> None:
    """Check that those rows of a fused weight that belong to a target match the base's weight.

    The rows are computed from an attention node's head counts or a Split's sizes. If these numbers are wrong, the rows
    are wrong, too.

    Raises:
        TargetNotFound: the rows differ from the base's weight by more than quantization explains.
    """
    for spot in place.spots:
        stored = spot.kind.stored_array(spot.node).astype(np.float32)
        stored = stored.swapaxes(0, 1) if spot.kind.turns(spot.node) else stored
        part = stored[slice(*spot.rows)] if spot.rows else stored
        far = float(np.linalg.norm(part - W)) / max(float(np.linalg.norm(W)), 1e-30) if part.shape == W.shape else 9.0
        if far > NEAR:
            why = f"the target's rows of the packed layer differ from the base's weight (relative distance {far:.2f})"
            cure = USE_EXPORTED_BASE
            raise TargetNotFound(why, where=str(place.asked), cure=cure)


def _twin(base: Checkpoint, name: str, W: Array) -> str | None:
    """Return the name of another base weight whose values equal the weight `name`; None if there is none."""
    same = (
        n for n, t in base.tensors.items() if n != name and t.shape == base.tensors[name].shape and t.dtype.floating
    )
    return next((other for other in same if np.array_equal(_array(base, other), W)), None)


def nearest(W: Array, weights: StoredWeights, where: str) -> tuple[str, list[Spot]]:
    """Find the layers that store a weight; return the method that found them, and the layers.

    Raises:
        TargetNotFound: no layer stores the weight, or several layers may store it.
    """
    near: list[_Near] = []
    second = float("inf")
    for groups in (weights.near(W), weights):
        near = _by_distance(W, groups)
        equal = [one for one in near if one.distance == 0]
        if equal:
            return "values", [spot for one in equal for spot in weights.like(one.spot)]
        if packed := _as_rows(W, weights.spots):
            return "packed", packed
        second = near[1].distance if len(near) > 1 else float("inf")
        if near and near[0].distance <= NEAR and second >= APART * near[0].distance:
            return "nearest", weights.like(near[0].spot)
    best = f"the nearest weight has a distance of {near[0].distance:.2f}" if near else "no weight has its shape"
    if near and near[0].distance <= NEAR:
        best = f"two weights are about equally near, with distances of {near[0].distance:.3f} and {second:.3f}"
    cure = USE_EXPORTED_BASE
    scaled = next((one.spot.node for one in near if is_scaled(one.spot, W)), None)
    if scaled is not None:
        best = f"{scaled.op_type} {scaled.name} stores it with each output channel multiplied by a factor"
        cure = "Use the graph before it is optimized: optimizers fold a scale after a layer into the layer's weight"
    raise TargetNotFound(f"no layer of the graph has this weight: {best}", where=where, cure=cure)


def _by_distance(W: Array, groups: Iterable[list[Spot]]) -> list[_Near]:
    """Return the groups' first layers with their distances from `W`, sorted by distance."""
    near = [_Near(d, same[0]) for same in groups if (d := distance(W, same[0])) is not None]
    # The second nearest layer decides whether the nearest is unambiguous.
    return sorted(near, key=lambda one: one.distance)


def _behind_scale(base: Checkpoint, name: str, W: Array, weights: StoredWeights) -> list[Spot]:
    """Return the nodes that store the base weight `name`, with or without one of the base's norms or scales folded in.

    The list is empty if no stored weight is near enough, or if two stored weights are about equally near.
    """
    candidates = []
    for same in weights:
        ways = [distance(W, same[0]), scaled_distance(base, name, same[0])]
        candidates += [(min(d for d in ways if d is not None), same)] if any(d is not None for d in ways) else []
    candidates.sort(key=lambda one: one[0])
    second = candidates[1][0] if len(candidates) > 1 else float("inf")
    return candidates[0][1] if candidates and candidates[0][0] <= NEAR and second >= APART * candidates[0][0] else []


def _as_rows(W: Array, spots: Sequence[Spot]) -> list[Spot]:
    """Find layers whose weight contains `W` as a range of rows, e.g. layers of packed queries, keys and values.

    Each returned spot selects this range.
    """
    spots_found = []
    for spot in spots:
        if W.ndim != 2 or len(spot.shape) != 2 or spot.shape[1] != W.shape[1] or spot.shape[0] <= W.shape[0]:
            continue
        stored = spot.kind.stored_array(spot.node)
        stored = stored.swapaxes(0, 1) if spot.kind.turns(spot.node) else stored
        for start in np.flatnonzero(_same(stored, W[0]).all(1)):
            part = stored[start : start + len(W)]
            if part.shape == W.shape and _same(part, W).all():
                rows = (int(start), int(start) + len(W))
                spots_found.append(replace(spot, rows=rows, shape=W.shape))
    return spots_found


def _same(stored: Array, W: Array) -> Array:
    """Return, for each element, whether the stored value matches the base's value.

    A stored 16-bit value may differ slightly, because converters to float16 round values and replace tiny values.
    """
    if stored.dtype.itemsize > 2:
        return np.asarray(stored == W)
    return np.asarray(abs(stored.astype(np.float32) - W) <= 2**-8 * abs(W) + 1e-6)


def _array(base: Checkpoint, name: str) -> Array:
    array: Array = as_array(base.tensors[name]).astype(np.float32)
    return array
