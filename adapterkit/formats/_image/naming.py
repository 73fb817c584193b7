"""Targets of image models in one naming, so that adapters of several tools can be compared and combined."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ...names.image import component_of, families_of, rooted, to_diffusers
from .translate import in_diffusers

if TYPE_CHECKING:
    from ...adapter import Target, Updates
    from ...updates import Update


def in_components(updates: Updates) -> dict[Target, tuple[Update, ...]]:
    """Targets behind the name of their part of a pipeline, in diffusers' words: `transformer.x_embedder`."""
    found: dict[Target, tuple[Update, ...]] = {}
    for target, each in updates.items():
        component = component_of(target.path)
        place = target if component is None else replace(target, path=f"{component}.{rooted(target.path)[1]}")
        found[place] = (*found.get(place, ()), *each)
    return found


def in_parts(updates: Updates) -> dict[Target, tuple[Update, ...]]:
    """Targets in diffusers' naming, behind the name of their part; updates of fused weights are parted."""
    return in_diffusers(in_components(updates))[0]


def parts_of(path: str) -> list[str]:
    """What diffusers calls a module of the native naming, or its parts; none where it is no such module."""
    root, rest = rooted(path)
    component = component_of(path)
    before = f"{component}." if root and component else ""
    return [before + name for family in families_of(rest, "native") for _, name in to_diffusers(family, rest)]
