"""Read the combinations with which a search starts: tuples, names of methods, or recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TypeAlias, cast

from ..errors import UsageError, nearest, shown
from ..io.locations import local
from ..ops.combiners import COMBINERS
from ..ops.parameters import resolved
from ..ops.recipes import Recipe, read_recipe

Combination: TypeAlias = tuple[str, Sequence[float], Mapping[str, float | str]]
"""A method, one weight per adapter, and parameters of the method."""

Start: TypeAlias = Combination | str | PathLike[str]
"""A combination, the name of a method (with all weights 1), or the path of a recipe."""


def combinations(
    start: Sequence[Start], names: Sequence[str], *, seed: int, rank: int | str | None, base: str | None
) -> list[Combination]:
    """Convert the start combinations to (method, weights, parameters).

    Args:
        start: the start combinations that the caller gave.
        names: the names of the adapters; a recipe must name the same adapters, in any order.
        seed: the seed of the search.
        rank: the rank of the search.
        base: the path of the base, or None.

    Raises:
        UsageError: a name is neither a method nor a file, or a recipe has settings that a trial cannot repeat.
        Malformed: a file is not a recipe.
    """
    if isinstance(start, (str, PathLike)):
        raise UsageError("start is not a list", where="start", cure="Pass a list by --start (start=[...])")
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
            cure = f"{known or 'See adapterkit list combine for the methods'}; or name a recipe by --start (start=)"
            raise UsageError(f"{fspath(each)!r} is neither a method nor a recipe", where="start", cure=cure)
    return made


def _checked(given: Sequence[object]) -> Combination:
    """Return a combination from a sequence of a method, weights and parameters.

    Raises:
        UsageError: the sequence does not have this form.
    """
    kinds = (str, Sequence, Mapping)
    if len(given) != len(kinds) or not all(isinstance(part, kind) for part, kind in zip(given, kinds, strict=True)):
        why = f"{shown(given)} is not a method, weights and parameters"
        raise UsageError(why, where="start", cure='Pass it as in ("ties", [1, 0.5], {"density": 0.3})')
    return cast("Combination", tuple(given))


def is_method(name: str) -> bool:
    """Whether a name is the name of a combiner, or of a plug-in followed by a combiner, as in `knots_ties`."""
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
            why = f"the recipe has {key} {theirs}, but the search has {ours[key]}"
            raise UsageError(why, path=path, where=key, cure=f"Type --{key} {theirs} ({key}=), or change the recipe")
    for key in ("compat", "each", "dtype", "disjoint"):
        if options.pop(key, None):
            cure = f"Remove {key} from the recipe, or name only its method by --start (start=)"
            raise UsageError(f"a search cannot use the setting `{key}` of a recipe", path=path, where=key, cure=cure)
    for key, value in [*(("weight", weight) for weight in weights), *options.items()]:
        if isinstance(value, (Mapping, list)):
            cure = f"Give {key} one value for all targets"
            raise UsageError(f"{key} differs between targets", path=path, where=key, cure=cure)
    return method, [cast("float", weights[at]) for at in order], options


def _order(recipe: Recipe, names: Sequence[str], path: Path) -> list[int]:
    """Return, for each adapter of the search, its index in the recipe."""
    left = list(range(len(recipe.adapters)))
    order: list[int] = []
    for name in names:
        at = next((at for at in left if _same_path(recipe.adapters[at], name)), None)
        if at is not None:
            left.remove(at)
            order.append(at)
    if left or len(order) < len(names):
        why = f"the recipe combines {', '.join(recipe.adapters)}, but the search combines {', '.join(names)}"
        raise UsageError(why, path=path, where="models", cure="Name the same adapters in both, in any order")
    return order


def _same_path(one: str, other: str | None) -> bool:
    return one == other or (other is not None and local(one).resolve() == local(other).resolve())
