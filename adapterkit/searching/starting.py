"""Combinations that a search starts from: given as such, by the name of a method, or as a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeAlias, cast

from ..errors import UsageError, nearest, shown
from ..io.locations import local
from ..ops.combiners import COMBINERS
from ..ops.parameters import resolved
from ..ops.recipes import Recipe, read_recipe

Combination: TypeAlias = tuple[str, Sequence[float], Mapping[str, Any]]
"""A method, one weight per adapter, and parameters of the method."""

Start: TypeAlias = Combination | str | PathLike[str]
"""A combination, the name of a method (at weight 1), or the path of a recipe."""


def combinations(
    start: Sequence[Start], names: Sequence[str], *, seed: int, rank: int | str | None, base: str | None
) -> list[Combination]:
    """Return the combinations that a caller starts from.

    Args:
        start: what the caller gave.
        names: the names of the adapters; a recipe must name the same ones, in any order.
        seed: the seed of the search.
        rank: the rank of the search.
        base: the path of the base, or None.

    Raises:
        UsageError: a name of neither a method nor a file, or a recipe that says more than a trial can repeat.
        Malformed: the file is not a recipe.
    """
    if isinstance(start, (str, PathLike)):
        cure = "Pass a list: start=[...]"
        raise UsageError("one start where a list belongs", where="start", cure=cure)
    made: list[Combination] = []
    for each in start:
        if isinstance(each, (tuple, list)):
            made.append(_checked(each))
        elif isinstance(each, str) and is_method(each):
            made.append((each, (1.0,) * len(names), {}))
        elif local(each).is_file():
            made.append(_of_recipe(local(each), names, seed, rank, base))
        else:
            known = nearest(fspath(each), COMBINERS)
            cure = f"{known or 'adapterkit list combine shows the methods'}; or name a file: --start (start=)"
            raise UsageError(f"{fspath(each)!r} is neither a method nor a recipe", where="start", cure=cure)
    return made


def _checked(given: Sequence[Any]) -> Combination:
    """Refuse what is not a method, weights and parameters."""
    kinds = (str, Sequence, Mapping)
    if len(given) != len(kinds) or not all(isinstance(part, kind) for part, kind in zip(given, kinds, strict=True)):
        why = f"{shown(given)} is not a method, weights and parameters"
        raise UsageError(why, where="start", cure='Such as ("ties", [1, 0.5], {"density": 0.3})')
    return given[0], given[1], given[2]


def is_method(name: str) -> bool:
    """Whether a combiner is called so, alone or joined with a plug-in, such as `knots_ties`."""
    return resolved(name, None)[0] in COMBINERS


def _of_recipe(path: Path, names: Sequence[str], seed: int, rank: int | str | None, base: str | None) -> Combination:
    recipe = read_recipe(path)
    options = dict(recipe.options)
    order = _order(recipe, names, path)
    weights, method = options.pop("weights"), options.pop("method")
    ours = {"seed": seed, "rank": rank, "base": base}
    for key in ours.keys() & options.keys():
        theirs = options.pop(key)
        if theirs != ours[key] and not (key == "base" and _same_path(theirs, base)):
            why = f"the recipe has {key} {theirs}, and the search {ours[key]}"
            raise UsageError(why, path=path, where=key, cure=f"Give both the same: --{key} ({key}=)")
    for key in ("compat", "each", "dtype", "disjoint"):
        if options.pop(key, None):
            cure = "Take it out of the recipe, or pass (method, weights, parameters) in start="
            raise UsageError(f"a trial of a search has no {key}", path=path, where=key, cure=cure)
    for key, value in [*(("weight", weight) for weight in weights), *options.items()]:
        if isinstance(value, (Mapping, list)):
            cure = "Give one value for all targets"
            raise UsageError(f"{key} differs between targets", path=path, where=key, cure=cure)
    return method, [cast("float", weights[at]) for at in order], options


def _order(recipe: Recipe, names: Sequence[str], path: Path) -> list[int]:
    """Return the place in the recipe of each adapter of the search."""
    left = list(range(len(recipe.adapters)))
    order: list[int] = []
    for name in names:
        at = next((at for at in left if _same_path(recipe.adapters[at], name)), None)
        if at is not None:
            left.remove(at)
            order.append(at)
    if left or len(order) < len(names):
        why = f"the recipe is of {', '.join(recipe.adapters)}, and the search of {', '.join(names)}"
        raise UsageError(why, path=path, where="models", cure="Name the same adapters in both, in any order")
    return order


def _same_path(one: str, other: str | None) -> bool:
    return one == other or (other is not None and local(one).resolve() == local(other).resolve())
