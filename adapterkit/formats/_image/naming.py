"""Translate targets of image models to one naming, so that adapters from several tools can be compared and combined."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import UsageError
from ...naming.image import component_of, families_of, rooted
from ...naming.image import families as all_families
from .deciding import Origin, denoiser_targets, families_of_all, module_of
from .translate import in_diffusers

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from ...core.adapter import Target, Updates
    from ...core.updates import Update
    from ...naming.image import ImageFamily


def in_components(updates: Updates) -> dict[Target, tuple[Update, ...]]:
    """Prefix targets with the component as diffusers names it: `x_embedder` becomes `transformer.x_embedder`."""
    found: dict[Target, tuple[Update, ...]] = {}
    for target, each in updates.items():
        component = component_of(module_of(target.path))
        place = target if component is None else replace(target, path=f"{component}.{rooted(target.path)[1]}")
        found[place] = (*found.get(place, ()), *each)
    return found


def in_parts(
    updates: Updates, families: tuple[str, ...] = (), *, fuse: bool = True
) -> dict[Target, tuple[Update, ...]]:
    """Translate targets to diffusers' naming with the component as prefix, and split updates of fused weights.

    Args:
        updates: the updates.
        families: the names of the possible families, if the caller knows them; empty: decide by the targets' names.
        fuse: whether a LoKr of a fused weight stays one update; see `in_naming`.
    """
    return in_diffusers(in_components(updates), (), Origin(families=families), fuse=fuse)[0]


def parts_of(path: str) -> list[str]:
    """Return diffusers' names for a module in its authors' naming: several for a fused weight, none if unknown."""
    root, rest = rooted(path)
    component = component_of(path)
    before = f"{component}." if root and component else ""
    pieces = (piece for family in families_of(rest, "native") for piece in family.moves(rest, "native", "diffusers"))
    return list(dict.fromkeys(before + piece.path for piece in pieces))


def in_one_naming(adapters: Sequence[Updates]) -> list[Updates]:
    """Translate targets of several adapters to one naming; change nothing if all adapters already have the same naming.

    Raises:
        UsageError: the adapters are for different families of image models.
    """
    paths = [[target.path for target in denoiser_targets(updates, ())] for updates in adapters]
    every = [path for each in paths for path in each]
    if sum(map(bool, paths)) < 2:
        return list(adapters)
    _check_families(paths)
    names = [rooted(path)[1] for path in every]
    families = families_of_all(every)
    roots = {rooted(path)[0] for path in every}
    same = any(_family(family).naming_of(names) for family in families)
    if not families or (same and len(roots) == 1):
        return list(adapters)
    return [in_components(updates) if same else in_parts(updates, families) for updates in adapters]


def _check_families(adapters: Sequence[Sequence[str]]) -> None:
    """Check that the module names of every adapter fit a family that also fits the first adapter.

    Raises:
        UsageError: an adapter fits no family of the first adapter; the error names the families of both adapters.
    """
    known = [(paths[0], frozenset(families_of_all(paths))) for paths in adapters if paths]
    for place, others in known[1:]:
        first = known[0][1]
        if not _alike(first, others):
            names = [_titles(each) or "an unknown family" for each in (first, others)]
            why = f"the adapters are for different models: {names[0]}, and {names[1]}"
            raise UsageError(
                why, where=place, cure="Give adapters for one base: these adapters change no common weight"
            )


def _alike(one: frozenset[str], other: frozenset[str]) -> bool:
    """Whether two sets of families have a common family; generic families count only if a set has no other family."""
    if not one or not other:
        return one == other
    special = [specific(names) for names in (one, other)]
    return bool(special[0] & special[1] if all(special) else one & other)


def specific(families: Collection[str]) -> frozenset[str]:
    """Return the families that are not generic."""
    return frozenset(name for name in families if not _family(name).facts.generic)


def _titles(families: frozenset[str]) -> str:
    return " or ".join(sorted(_family(name).title for name in specific(families) or families))


def _family(name: str) -> ImageFamily:
    return next(each for each in all_families() if each.name == name)
