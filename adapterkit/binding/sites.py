"""Sites: where a target lies in a base, by its names alone.

A name resolves exactly, or by one prefix that is added to or taken off all of them alike; never by guessing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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


def find_sites(
    adapter: Adapter, shapes: Shapes, *, partial: bool, modules: Iterable[str] = ()
) -> tuple[list[Site], list[Target], Prefix | None]:
    """Every target's site, the targets that have none, and the prefix change that was needed.

    A target whose updates are all of outputs may be any module: one that stored tensors lie below, or one of `modules`.

    Raises:
        TargetNotFound: some have none and `partial` is off, or all have none; names the nearest.
    """
    if not adapter.updates:
        return [], [], None
    outer = {target.path for target, updates in adapter.updates.items() if all(u.kind == "output" for u in updates)}
    below = {name[:at] for name in shapes for at, letter in enumerate(name) if letter == "."} if outer else set()
    places = _Places(shapes, frozenset({*below, *modules}), frozenset(outer))
    renamed = _prefix_change([target.path for target in adapter.updates], places, partial)
    placed, missing = _place(adapter, places, renamed)
    if missing and not (partial and placed):
        raise _not_found(missing, adapter, places)
    return placed, missing, renamed


@dataclass(frozen=True, slots=True)
class _Places:
    """What targets are looked up in: stored tensors and modules, and which targets may be any module."""

    shapes: Shapes
    modules: frozenset[str]
    outer: frozenset[str]

    def keys(self, path: str, target: str) -> tuple[str | None, str | None] | None:
        """(weight, bias) names at the path that a target's has become; None where it has no place."""
        if target not in self.outer:
            return _keys(path, self.shapes)
        weight, bias = f"{path}.weight", f"{path}.bias"
        held = weight if weight in self.shapes else None, bias if bias in self.shapes else None
        return held if path in self.modules else None


def _place(adapter: Adapter, places: _Places, renamed: tuple[str, str] | None) -> tuple[list[Site], list[Target]]:
    placed, missing = [], []
    for target, updates in adapter.updates.items():
        path = target.path if renamed is None else _rename(target.path, *renamed)
        keys = places.keys(path, target.path)
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


def _prefix_change(paths: list[str], places: _Places, partial: bool) -> Prefix | None:
    """The one prefix change that gives every path a place, or most of them where a part will do; None without one."""
    lost = [path for path in paths if places.keys(path, path) is None]
    if not lost:
        return None
    trials = {c for path in (lost if partial else lost[:1]) for c in _prefix_candidates(path, places)}
    placed = {c: sum(places.keys(_rename(path, *c), path) is not None for path in paths) for c in trials}
    most = max(placed.values(), default=0)
    best = [c for c, count in placed.items() if count == most]
    wanted = len(paths) if not partial else len(paths) - len(lost) + 1
    return best[0] if len(best) == 1 and most >= wanted else None


def _prefix_candidates(path: str, places: _Places) -> Iterator[Prefix]:
    parts = path.split(".")
    for cut in range(1, len(parts)):
        if places.keys(".".join(parts[cut:]), path):
            yield ".".join(parts[:cut]) + ".", ""
    outer = path in places.outer
    for name in places.modules if outer else places.shapes:
        for tail in (f".{path}",) if outer else (f".{path}.weight", f".{path}"):
            if name.endswith(tail):
                yield "", name.removesuffix(tail) + "."


def _rename(path: str, off: str, on: str) -> str:
    return on + path.removeprefix(off) if path.startswith(off) else on + path


def _not_found(missing: list[Target], adapter: Adapter, places: _Places) -> TargetNotFound:
    stored = (name.rpartition(".")[0] if name.endswith((".weight", ".bias")) else name for name in places.shapes)
    modules = {*stored, *(places.modules if places.outer else ())}
    count = f"{len(missing)} of {len(adapter.updates)} targets" if len(adapter.updates) > 1 else "the target"
    shown = ", ".join(str(target) for target in missing[:3]) + (", ..." if len(missing) > 3 else "")
    partly = "" if len(missing) == len(adapter.updates) else "; allow a partial match to leave them out"
    near = nearest(missing[0].path, modules) or "Nothing in the base has a similar name: is it the right base?"
    return TargetNotFound(f"{count} not in the base: {shown}", where=str(missing[0]), cure=near + partly)
