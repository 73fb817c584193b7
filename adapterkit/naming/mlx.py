"""Translate names between MLX-LM's models and a hub: mostly experts, which MLX stores in one stack.

The names are data, the naming `mlx` of spec/architectures. A folder of MLX-LM does not name its family. Without a base,
all families that have a name are tried, and must give the same answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .architectures import WEIGHT, Architecture, architecture_of, with_naming
from .resolver import translate

if TYPE_CHECKING:
    from .resolver import Move

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
    families = [each for each in _families(config) if naming != WEIGHT or each.find(name, NAMING)]
    # Prefer families that a hub stores with one tensor an expert; one with stacks has no such names, and fails later.
    apart = [each for each in families if naming == WEIGHT and _on_hub(each, name)]
    for family in apart or families:
        moves = translate(name, family, naming, experts)
        if moves:
            found.setdefault(moves, family.family)
    if len(found) > 1:
        why = f"{' and '.join(found.values())} keep this in different places: {', '.join(m[0].path for m in found)}"
        raise UsageError(why, where=name, cure="Pass --base (base=), which tells the family")
    return next(iter(found), None)


def _on_hub(family: Architecture, name: str) -> bool:
    """Whether a hub stores the weights of a module of MLX-LM's model under names of their own."""
    places = [family.place(key, "hub") for key, _, _ in family.find(name, NAMING)]
    return all(place is not None and place.of is None and not place.stacked for place in places)


def _families(config: Mapping[str, Any] | None) -> Sequence[Architecture]:
    for each in (config, (config or {}).get("text_config")):
        found = architecture_of(each) if isinstance(each, dict) else None
        if found is not None:
            return (found,)
    return _all()


@cache
def _all() -> tuple[Architecture, ...]:
    return tuple(with_naming(NAMING))
