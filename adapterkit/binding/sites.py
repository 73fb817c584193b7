"""Sites: where a target lies in a base, by its names alone.

A name resolves exactly, or by one prefix that is added to or taken off all of them alike; never by guessing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ..adapter import Adapter, Target
from ..errors import TargetNotFound, nearest
from ..updates import Update

Shapes = Mapping[str, tuple[int, ...]]
"""Names of stored tensors -> their shapes."""

Prefix = tuple[str, str]
"""What is taken off the front of each path, and what is put there."""


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A target in a base: `weight` and `bias` name stored tensors, None where the base has none."""

    target: Target
    updates: tuple[Update, ...]
    weight: str | None
    bias: str | None


def apart(adapter: Adapter) -> tuple[Adapter, Adapter]:
    """The updates of weights and outputs, which lie at stored tensors, and those of context, which do not."""
    context = {t: us for t, us in adapter.updates.items() if any(u.kind == "context" for u in us)}
    others = {t: us for t, us in adapter.updates.items() if t not in context}
    return adapter.replace(updates=others), adapter.replace(updates=context)


def find_parts(adapter: Adapter, shapes: Shapes, renamed: Prefix | None) -> dict[Target, tuple[Update, ...]]:
    """Context updates under the base's own names for the parts that they speak to; the model itself has none.

    Raises:
        TargetNotFound: the base has no such part; names the nearest.
    """
    found = {}
    modules = {name[:stop] for name in shapes for stop in range(len(name)) if name[stop] == "."}
    for target, updates in adapter.updates.items():
        path = target.path
        if path and path not in modules:
            path = _rename(path, *(renamed or _part_change(path, modules)))
        if path and path not in modules:
            cure = nearest(target.path, modules) or "Is this the base that the adapter was trained on?"
            raise TargetNotFound("no such part in the base", where=str(target), cure=cure)
        found[replace(target, path=path)] = updates
    return found


def _part_change(path: str, modules: set[str]) -> Prefix:
    """The one prefix change that gives a part a place; none where there is none, or more than one."""
    parts = path.split(".")
    off = [".".join(parts[:cut]) + "." for cut in range(1, len(parts)) if ".".join(parts[cut:]) in modules]
    on = [module.removesuffix(path) for module in modules if module.endswith(f".{path}")]
    changes = [(prefix, "") for prefix in off] + [("", prefix) for prefix in on]
    return changes[0] if len(changes) == 1 else ("", "")


def find_sites(adapter: Adapter, shapes: Shapes, *, partial: bool) -> tuple[list[Site], list[Target], Prefix | None]:
    """Every target's site, the targets that have none, and the prefix change that was needed.

    Raises:
        TargetNotFound: some have none and `partial` is off, or all have none; names the nearest.
    """
    if not adapter.updates:
        return [], [], None
    renamed = _prefix_change([target.path for target in adapter.updates], shapes, partial)
    placed, missing = _place(adapter, shapes, renamed)
    if missing and not (partial and placed):
        raise _not_found(missing, adapter, shapes)
    return placed, missing, renamed


def _place(adapter: Adapter, shapes: Shapes, renamed: tuple[str, str] | None) -> tuple[list[Site], list[Target]]:
    placed, missing = [], []
    for target, updates in adapter.updates.items():
        path = target.path if renamed is None else _rename(target.path, *renamed)
        keys = _keys(path, shapes)
        if keys is None:
            missing.append(target)
        else:
            placed.append(Site(replace(target, path=path), updates, *keys))
    return placed, missing


def _keys(path: str, shapes: Shapes) -> tuple[str | None, str | None] | None:
    """(weight, bias) names of a module or parameter; None where the base has neither."""
    weight, bias = f"{path}.weight", f"{path}.bias"
    if weight in shapes or bias in shapes:
        return weight if weight in shapes else None, bias if bias in shapes else None
    if path not in shapes:
        return None
    stem, found, tail = path.rpartition("weight")
    bias = f"{stem}bias{tail}"
    return path, bias if found and bias in shapes else None


def _prefix_change(paths: list[str], shapes: Shapes, partial: bool) -> Prefix | None:
    """The one prefix change that gives every path a place, or most of them where a part will do; None without one."""
    lost = [path for path in paths if _keys(path, shapes) is None]
    if not lost:
        return None
    trials = {c for path in (lost if partial else lost[:1]) for c in _prefix_candidates(path, shapes)}
    placed = {c: sum(_keys(_rename(path, *c), shapes) is not None for path in paths) for c in trials}
    most = max(placed.values(), default=0)
    best = [c for c, count in placed.items() if count == most]
    wanted = len(paths) if not partial else len(paths) - len(lost) + 1
    return best[0] if len(best) == 1 and most >= wanted else None


def _prefix_candidates(path: str, shapes: Shapes) -> Iterator[Prefix]:
    parts = path.split(".")
    for cut in range(1, len(parts)):
        if _keys(".".join(parts[cut:]), shapes):
            yield ".".join(parts[:cut]) + ".", ""
    for name in shapes:
        for tail in (f".{path}.weight", f".{path}"):
            if name.endswith(tail):
                yield "", name.removesuffix(tail) + "."


def _rename(path: str, off: str, on: str) -> str:
    return on + path.removeprefix(off) if path.startswith(off) else on + path


def _not_found(missing: list[Target], adapter: Adapter, shapes: Shapes) -> TargetNotFound:
    modules = {name.rpartition(".")[0] if name.endswith((".weight", ".bias")) else name for name in shapes}
    count = f"{len(missing)} of {len(adapter.updates)} targets" if len(adapter.updates) > 1 else "the target"
    shown = ", ".join(str(target) for target in missing[:3]) + (", ..." if len(missing) > 3 else "")
    partly = "" if len(missing) == len(adapter.updates) else "; allow a partial match to leave them out"
    near = nearest(missing[0].path, modules) or "Nothing in the base has a similar name: is it the right base?"
    return TargetNotFound(f"{count} not in the base: {shown}", where=str(missing[0]), cure=near + partly)
