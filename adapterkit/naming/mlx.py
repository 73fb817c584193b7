"""Translate names between MLX-LM's models and the models on a hub.

Most differences concern experts, whose tensors MLX-LM stacks.

The names are data, the naming `mlx` in spec/architectures. MLX-LM's adapter folders do not name the family of the base.
Without a base, all families that have a name are tried. These families must agree on names of experts; other names stay
unchanged if the families disagree.
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
    """Find where a target's weights are in MLX-LM's model; None if the name is the same as on a hub.

    Args:
        name: the target's name, in any naming of its family.
        config: the base's config, if known.
        experts: the number of experts in a stack with this name.

    Raises:
        UsageError: several families have this name but different names in MLX-LM, and `config` names no family.
    """
    return _translated(name, config, experts, NAMING)


def from_mlx(name: str, config: Mapping[str, object] | None, experts: int) -> tuple[Move, ...] | None:
    """Find the hub's names of the weights (and single experts) in a module of MLX-LM's model.

    The arguments are those of `to_mlx`.
    """
    return _translated(name, config, experts, WEIGHT)


def _translated(name: str, config: Mapping[str, object] | None, experts: int, naming: str) -> tuple[Move, ...] | None:
    found: dict[tuple[Move, ...], str] = {}
    family = _family(config)
    for each in _candidates(name, naming) if family is None else [family]:
        there = each.find(name, NAMING)
        if naming == WEIGHT and not there:
            continue
        same = naming == WEIGHT and all(each.place(weight, "hub") == place for weight, place, _ in there)
        # Keep the name if the hub's model fuses the same weights as MLX-LM, such as queries, keys and values.
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
    """Return the families that have this name and in which MLX-LM's name differs from the hub's.

    When translating to the hub's names, prefer families whose experts are separate on hubs, because only these have
    names for single experts.
    """
    shapes = [shape_of(own) for own in variants(name)]
    found = [each for each, templates in _all() if any(shape in templates for shape in shapes)]
    apart = [each for each in found if naming == WEIGHT and each.find(name, NAMING) and _on_hub(each, name)]
    return apart or found


def _keep(name: str) -> bool:
    return shape_of(name) in _kept()


def is_absent(name: str, config: Mapping[str, object] | None) -> bool:
    """Whether MLX-LM's models lack the weight with this name, according to every family that has the name.

    DeepSeek's `kv_b_proj` becomes two stacks with a matrix per head, which MLX-LM's `load_adapters` cannot adapt. Other
    examples: the layers in Prism's packs are rotated, and the parts of Muse Spark's fused queries, keys, values and
    gates have unequal sizes.
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
    """Whether the hub's model has separate names for the weights that MLX-LM stores in one module."""
    places = [family.place(key, "hub") for key, _, _ in family.find(name, NAMING)]
    return all(place is not None and place.of is None and not place.stacked for place in places)


def _family(config: Mapping[str, object] | None) -> Architecture | None:
    for each in (config, (config or {}).get("text_config")):
        found = architecture_of(each) if isinstance(each, dict) else None
        if found is not None:
            return found
    return None


def _common() -> Iterator[Architecture]:
    """Yield the families of MLX-LM, except those marked `rare`.

    In a rare family, experts have names that other families use for other weights.
    """
    return (each for each in with_naming(NAMING) if not each.record.rare)


@cache
def _all() -> tuple[tuple[Architecture, frozenset[str]], ...]:
    """List (family, templates): for each weight that MLX-LM renames, the templates of its name in all namings."""
    found = []
    for each in _common():
        changed = [weight for weight, places in each.record.weights.items() if not _same(each, weight)]
        places = (each.place(weight, naming) for weight in changed for naming in (*each.namings, WEIGHT))
        found.append((each, frozenset(_shape(place) for place in places if place is not None)))
    return tuple(each for each in found if each[1])


@cache
def _kept() -> frozenset[str]:
    """List the templates of all names that, in some family, are the same in MLX-LM and on a hub."""
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
