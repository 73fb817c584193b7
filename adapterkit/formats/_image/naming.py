"""Targets of image models in one naming, so that adapters of several tools can be compared and combined."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import UsageError
from ...naming.image import NAMINGS, component_of, families_of, is_not_xl, is_xl, rooted, to_diffusers
from ...naming.image import families as all_families
from .deciding import Origin, denoiser_targets, families_of_all
from .translate import in_diffusers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...adapter import Target, Updates
    from ...naming.patterns import Names
    from ...updates import Update


def in_components(updates: Updates) -> dict[Target, tuple[Update, ...]]:
    """Targets behind the name of their part of a pipeline, in diffusers' words: `transformer.x_embedder`."""
    found: dict[Target, tuple[Update, ...]] = {}
    for target, each in updates.items():
        component = component_of(target.path)
        place = target if component is None else replace(target, path=f"{component}.{rooted(target.path)[1]}")
        found[place] = (*found.get(place, ()), *each)
    return found


def in_parts(updates: Updates, families: tuple[str, ...] = ()) -> dict[Target, tuple[Update, ...]]:
    """Targets in diffusers' naming, behind the name of their part; updates of fused weights are parted.

    Args:
        updates: the updates.
        families: what they can be of, where more than their own names tells that.
    """
    return in_diffusers(in_components(updates), (), Origin(families=families))[0]


def parts_of(path: str) -> list[str]:
    """What diffusers calls a module of the native naming, or its parts; none where it is no such module."""
    root, rest = rooted(path)
    component = component_of(path)
    before = f"{component}." if root and component else ""
    return [before + name for family in families_of(rest, "native") for _, name in to_diffusers(family, rest)]


def in_one_naming(adapters: Sequence[Updates]) -> list[Updates]:
    """Targets of several adapters in one naming; as they are where their U-Nets or transformers have one already.

    Raises:
        UsageError: they are of different families of image models.
    """
    paths = [[target.path for target in denoiser_targets(updates, ())] for updates in adapters]
    every = [path for each in paths for path in each]
    if sum(map(bool, paths)) < 2:
        return list(adapters)
    _check_families(paths)
    names = [rooted(path)[1] for path in every]
    families = families_of_all(every)
    roots = {rooted(path)[0] for path in every}
    same = any(all(name in _names(family, naming) for name in names) for family in families for naming in NAMINGS)
    if not families or (same and len(roots) == 1):
        return list(adapters)
    return [in_components(updates) if same else in_parts(updates, families) for updates in adapters]


def _check_families(adapters: Sequence[Sequence[str]]) -> None:
    """Check that one family has all names that are known.

    Raises:
        UsageError: there is none; names the families.
    """
    known = [(paths[0], frozenset(families_of_all(paths)), _kind(paths)) for paths in adapters if paths]
    for place, families, kind in known[1:]:
        first, others = known[0][1], families
        alike = first & others if first and others else first == others
        if not alike or (kind and known[0][2] and kind != known[0][2]):
            names = [" or ".join(sorted(each)) or "an unknown family" for each in (first, others)]
            if kind and known[0][2] and kind != known[0][2]:
                names = [known[0][2], kind]
            why = f"the adapters are of different models: {names[0]}, and {names[1]}"
            raise UsageError(
                why, where=place, cure="Name adapters of one base; none of these changes what the others do"
            )


def _kind(paths: Sequence[str]) -> str:
    """Which of the U-Nets it is, that are one family."""
    names = [rooted(path)[1] for path in paths]
    return "Stable Diffusion XL" if is_xl(names) else "Stable Diffusion 1 or 2" if is_not_xl(names) else ""


def _names(family: str, naming: str) -> Names:
    return next(each for each in all_families() if each.name == family).names(naming)
