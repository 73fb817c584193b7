"""Translate names between MLX-LM's models and a hub: mostly experts, which MLX stores in one stack.

The names are data, the naming `mlx` of spec/architectures. A folder of MLX-LM does not name its family. Without a base,
all families that have a name are tried. Experts must have the same place in all of them; another name stays as it is
where the families differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from ..errors import UsageError
from .architectures import HOLE, WEIGHT, Architecture, Place, architecture_of, shape_of, with_naming
from .by_family import translate, variants
from .moves import Move

NAMING = "mlx"


def to_mlx(name: str, config: Mapping[str, Any] | None, experts: int) -> tuple[Move, ...] | None:
    """Find a target's parts in MLX-LM's model; None if the name is the same there as on a hub.

    Args:
        name: the target's name, in any naming of its family.
        config: the base's config, if known.
        experts: how many experts a stack of this name has.

    Raises:
        UsageError: the families that have the name differ, and there is no config to tell which is meant.
    """
    return _translated(name, config, experts, NAMING)


def from_mlx(name: str, config: Mapping[str, Any] | None, experts: int) -> tuple[Move, ...] | None:
    """Find the parts of a module of MLX-LM's model on a hub, expert after expert; arguments as in `to_mlx`."""
    return _translated(name, config, experts, WEIGHT)


def _translated(name: str, config: Mapping[str, Any] | None, experts: int, naming: str) -> tuple[Move, ...] | None:
    found: dict[tuple[Move, ...], str] = {}
    family = _family(config)
    for each in _candidates(name, naming) if family is None else [family]:
        there = each.find(name, NAMING)
        if naming == WEIGHT and not there:
            continue
        same = naming == WEIGHT and all(each.place(weight, "hub") == place for weight, place, _ in there)
        # A hub may store the queries, keys and values of several weights in one tensor, as MLX-LM does.
        moves = (Move(name),) if same else translate(name, each, naming, experts)
        if moves:
            found.setdefault(moves, each.family)
    if family is None and found and any(_keep(own) for own in variants(name)):
        found.setdefault((Move(name),), "other families")
    if len(found) > 1 and any(move.plain for moves in found for move in moves):
        # `model.layers.0.self_attn.q_proj` has another prefix in MLX's vision-language models than in all others.
        return None
    if len(found) > 1:
        why = f"{' and '.join(found.values())} keep this in different places: {', '.join(m[0].path for m in found)}"
        raise UsageError(why, where=name, cure="Pass --base (base=), which tells the family")
    return next(iter(found), None)


def _candidates(name: str, naming: str) -> list[Architecture]:
    """Return the families that may have a name, without those that MLX-LM calls as a hub does.

    From MLX's names on, those are left out that a hub stores in stacks: they have no names of single experts.
    """
    shapes = [shape_of(own) for own in variants(name)]
    found = [each for each, templates in _all() if any(shape in templates for shape in shapes)]
    apart = [each for each in found if naming == WEIGHT and each.find(name, NAMING) and _on_hub(each, name)]
    return apart or found


def _keep(name: str) -> bool:
    return shape_of(name) in _kept()


def is_absent(name: str, config: Mapping[str, Any] | None) -> bool:
    """Whether every family that has a weight of this name says that MLX-LM's model lacks it.

    DeepSeek's `kv_b_proj` becomes two stacks of matrices, one a head, which MLX-LM's `load_adapters` cannot adapt. The
    layers of Prism's packs are rotated, and Muse Spark's joined queries, keys, values and gates have unequal sizes.
    """
    family = _family(config)
    found = [
        each.record.weights[weight].get(NAMING)
        for each in ([family] if family is not None else _candidates(name, NAMING))
        for naming in each.namings_with(name)
        if naming != NAMING
        for weight, _, _ in each.find(name, naming)
    ]
    return bool(found) and all(place == "" for place in found)


def _on_hub(family: Architecture, name: str) -> bool:
    """Whether a hub stores the weights of a module of MLX-LM's model under names of their own."""
    places = [family.place(key, "hub") for key, _, _ in family.find(name, NAMING)]
    return all(place is not None and place.of is None and not place.stacked for place in places)


def _family(config: Mapping[str, Any] | None) -> Architecture | None:
    for each in (config, (config or {}).get("text_config")):
        found = architecture_of(each) if isinstance(each, dict) else None
        if found is not None:
            return found
    return None


def _common() -> Iterator[Architecture]:
    """Yield the families of MLX-LM, save those whose experts have names that other families have elsewhere."""
    return (each for each in with_naming(NAMING) if not each.record.rare)


@cache
def _all() -> tuple[tuple[Architecture, frozenset[str]], ...]:
    """List the families with the templates of all names that MLX-LM changes."""
    found = []
    for each in _common():
        changed = [weight for weight, places in each.record.weights.items() if not _same(each, weight)]
        places = (each.place(weight, naming) for weight in changed for naming in (*each.namings, WEIGHT))
        found.append((each, frozenset(_shape(place) for place in places if place is not None)))
    return tuple(each for each in found if each[1])


@cache
def _kept() -> frozenset[str]:
    """List the templates of the names that some family has in MLX-LM as on a hub."""
    return frozenset(
        _shape(Place(weight)) if place is None else _shape(place)
        for each in _common()
        for weight in each.record.weights
        if _same(each, weight)
        for place in [each.place(weight, "hub")]
    )


def _same(family: Architecture, weight: str) -> bool:
    """Whether MLX-LM calls a weight as a hub does."""
    return family.record.weights[weight].get(NAMING) is None


def _shape(place: Place) -> str:
    return shape_of(HOLE.sub("0", place.name))
