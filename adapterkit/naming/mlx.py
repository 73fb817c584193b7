"""Names of MLX-LM's models where they are not a hub's own: mostly experts, which MLX holds in one stack.

They are data, the naming `mlx` of spec/architectures. A folder of MLX-LM does not say its family. Without a base, all
families that have a name are asked, and must give the same answer.
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
    """Where a target's parts are in MLX-LM's model; None where the name is a hub's own there too.

    Args:
        name: of the target, in any naming of its family.
        config: the base's, if known.
        experts: how many experts a stack by this name has.

    Raises:
        UsageError: families that have the name differ, and the config would tell which.
    """
    return _translated(name, config, experts, NAMING)


def from_mlx(name: str, config: Mapping[str, Any] | None, experts: int) -> tuple[Move, ...] | None:
    """Where the parts of a module of MLX-LM's model are on a hub, expert after expert; arguments as in `to_mlx`."""
    return _translated(name, config, experts, WEIGHT)


def _translated(name: str, config: Mapping[str, Any] | None, experts: int, naming: str) -> tuple[Move, ...] | None:
    found: dict[tuple[Move, ...], str] = {}
    families = [each for each in _families(config) if naming != WEIGHT or each.find(name, NAMING)]
    # Where a hub has one tensor an expert, its names are taken: a family with stacks has none, and refuses them later.
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
    """Whether a hub keeps the weights of a module of MLX-LM's model under names of their own."""
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
