"""Translate names between MLX-LM's models and a hub: mostly experts, which MLX stores in one stack.

The names are data, the naming `mlx` in spec/architectures. MLX-LM's folders do not name their family. Without a base,
all families with a name are tried. They must agree on names of experts. Other names stay unchanged if the families
differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

from ..errors import UsageError
from .architectures import HOLE, WEIGHT, Architecture, Place, architecture_of, shape_of, with_naming
from .by_family import translate, variants
from .moves import Move

NAMING = "mlx"


def to_mlx(name: str, config: Mapping[str, object] | None, experts: int) -> tuple[Move, ...] | None:
    """Find a target's parts in MLX-LM's model; None if the name is the same as on a hub.

    Args:
        name: the target's name, in any naming of its family.
        config: the base's config, if known.
        experts: the number of experts in a stack with this name.

    Raises:
        UsageError: the families with this name differ, and no config shows which is meant.
    """
    return _translated(name, config, experts, NAMING)


def from_mlx(name: str, config: Mapping[str, object] | None, experts: int) -> tuple[Move, ...] | None:
    """Find a hub's parts of a module in MLX-LM's model, expert by expert; see `to_mlx` for the arguments."""
    return _translated(name, config, experts, WEIGHT)


def _translated(name: str, config: Mapping[str, object] | None, experts: int, naming: str) -> tuple[Move, ...] | None:
    found: dict[tuple[Move, ...], str] = {}
    family = _family(config)
    for each in _candidates(name, naming) if family is None else [family]:
        there = each.find(name, NAMING)
        if naming == WEIGHT and not there:
            continue
        same = naming == WEIGHT and all(each.place(weight, "hub") == place for weight, place, _ in there)
        # Keep the name if a hub fuses weights in the same tensor as MLX-LM, such as queries, keys and values.
        moves = (Move(name),) if same else translate(name, each, naming, experts)
        if moves:
            found.setdefault(moves, each.family)
    if family is None and found and any(_keep(own) for own in variants(name)):
        found.setdefault((Move(name),), "other families")
    if len(found) > 1 and any(move.plain for moves in found for move in moves):
        # Keep the name if families disagree: `model.layers.0.self_attn.q_proj` has another prefix in MLX's
        # vision-language models than in its other models.
        return None
    if len(found) > 1:
        why = f"{' and '.join(found.values())} have different names for it: {', '.join(m[0].path for m in found)}"
        raise UsageError(why, where=name, cure="Give the base, which shows the family: --base (base=)")
    return next(iter(found), None)


def _candidates(name: str, naming: str) -> list[Architecture]:
    """Return the families that may have a name, without those in which MLX-LM and hubs use the same name.

    When translating from MLX's names, families whose experts are stacked on hubs are omitted, because they have no
    names for single experts.
    """
    shapes = [shape_of(own) for own in variants(name)]
    found = [each for each, templates in _all() if any(shape in templates for shape in shapes)]
    apart = [each for each in found if naming == WEIGHT and each.find(name, NAMING) and _on_hub(each, name)]
    return apart or found


def _keep(name: str) -> bool:
    return shape_of(name) in _kept()


def is_absent(name: str, config: Mapping[str, object] | None) -> bool:
    """Whether every family with a weight of this name states that MLX-LM's model lacks the weight.

    DeepSeek's `kv_b_proj` becomes two stacks with a matrix per head, which MLX-LM's `load_adapters` cannot adapt. The
    layers of Prism's packs are rotated. Muse Spark's fused queries, keys, values and gates have unequal sizes.
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
    """Whether a hub stores the weights of a module of MLX-LM's model under separate names."""
    places = [family.place(key, "hub") for key, _, _ in family.find(name, NAMING)]
    return all(place is not None and place.of is None and not place.stacked for place in places)


def _family(config: Mapping[str, object] | None) -> Architecture | None:
    for each in (config, (config or {}).get("text_config")):
        found = architecture_of(each) if isinstance(each, dict) else None
        if found is not None:
            return found
    return None


def _common() -> Iterator[Architecture]:
    """Yield MLX-LM's families, except those whose experts' names mean something else in other families."""
    return (each for each in with_naming(NAMING) if not each.record.rare)


@cache
def _all() -> tuple[tuple[Architecture, frozenset[str]], ...]:
    """List the families, each with the templates of all names that MLX-LM changes."""
    found = []
    for each in _common():
        changed = [weight for weight, places in each.record.weights.items() if not _same(each, weight)]
        places = (each.place(weight, naming) for weight in changed for naming in (*each.namings, WEIGHT))
        found.append((each, frozenset(_shape(place) for place in places if place is not None)))
    return tuple(each for each in found if each[1])


@cache
def _kept() -> frozenset[str]:
    """List the templates of names that are the same in MLX-LM and on a hub for some family."""
    return frozenset(
        _shape(Place(weight)) if place is None else _shape(place)
        for each in _common()
        for weight in each.record.weights
        if _same(each, weight)
        for place in [each.place(weight, "hub")]
    )


def _same(family: Architecture, weight: str) -> bool:
    """Whether MLX-LM and hubs have the same name for a weight."""
    return family.record.weights[weight].get(NAMING) is None


def _shape(place: Place) -> str:
    return shape_of(HOLE.sub("0", place.name))
