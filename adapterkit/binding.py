"""Binding: where each target of an adapter lies in a base, and whether its shapes fit there.

Names resolve exactly, or by one prefix that is added to or taken off all of them alike; never by guessing. Storage
layouts are proven by shapes, then by the family's table, then by the adapter's own word.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

from .adapter import LAYOUTS, Adapter, Target
from .errors import AdapterkitError, NotMergeable, ShapeMismatch, TargetNotFound, UsageError, nearest
from .names.layouts import stored_in_out
from .tensors.lazy import as_torch
from .updates import Additive, Update

if TYPE_CHECKING:
    import torch

    from .tensors.checkpoint import Checkpoint

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A target in a base: `weight` and `bias` name stored tensors, None where the base has none."""

    target: Target
    updates: tuple[Update, ...]
    weight: str | None
    bias: str | None


@dataclass(frozen=True, slots=True, eq=False)
class Binding:
    """An adapter bound to a base.

    Attributes:
        adapter: with targets in the base's names and layouts.
        sites: one an entry, in the adapter's order.
        missing: targets without a place, when partial binding was allowed.
        renamed: the prefix that was (taken off, added), if any.
    """

    adapter: Adapter
    sites: tuple[Site, ...]
    missing: tuple[Target, ...]
    renamed: tuple[str, str] | None


def bind(
    adapter: Adapter, base: Checkpoint | str | PathLike[str], *, partial: bool = False, aliases: Mapping[str, str] = {}
) -> Binding:
    """Binds an adapter to a base.

    Args:
        adapter: the adapter.
        base: an open checkpoint or the path of one.
        partial: leave targets without a place out instead of refusing; at least one must have a place.
        aliases: further names of stored tensors (a tied head), alias -> stored name.

    Raises:
        TargetNotFound: targets without a place; names the nearest.
        ShapeMismatch: a shape does not fit, or a square weight's layout cannot be told.
    """
    base = _opened(base)
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    shapes |= {alias: shapes[name] for alias, name in aliases.items()}
    renamed = _prefix_change([target.path for target in adapter.updates], shapes)
    placed, missing = _place(adapter, shapes, renamed)
    if missing and not (partial and placed):
        raise _not_found(missing, adapter, shapes)
    sites = _with_layouts(placed, shapes, base.config)
    for site in sites:
        _check_site(site, shapes)
    updates: dict[Target, tuple[Update, ...]] = {}
    for site in sites:
        updates[site.target] = (*updates.get(site.target, ()), *site.updates)
    return Binding(adapter.replace(updates=updates), tuple(sites), tuple(missing), renamed)


def delta(adapter: Adapter, path: str, base: Checkpoint | str | PathLike[str] | None) -> torch.Tensor:
    """W' - W at `path`, float32 in the view `[out, in, *k]`; see `Adapter.delta`."""
    import torch

    if base is None:
        found = adapter.find(path)
        _one_view(path, found)
        return _free_delta(found).float()
    part = adapter.replace(updates=adapter.find(path))
    checkpoint = _opened(base)
    sites = bind(part, checkpoint).sites
    _one_view(path, [site.target for site in sites])
    weight = sites[0].weight
    if weight is None:
        raise NotMergeable("changes a bias only", where=path, cure="There is no weight difference to return")
    W = view(as_torch(checkpoint.tensors[weight], dtype=torch.float64), sites[0].target)
    return (fold([u for site in sites for u in site.updates], W, sites[0].target.stacked) - W).float()


def view(W: torch.Tensor, target: Target) -> torch.Tensor:
    """A stored weight as its target's updates see it: `[out, in, *k]`, or `[e, out, in, *k]`; no copy."""
    if target.layout == "in out *k":
        W = W.swapaxes(0, 1)
    elif target.layout == "e in out *k":
        W = W.swapaxes(1, 2)
    return W if target.rows is None else W.narrow(int(target.stacked), target.rows[0], target.rows[1] - target.rows[0])


def fold(updates: Iterable[Update], W: torch.Tensor, stacked: bool) -> torch.Tensor:
    """Loads the updates in the dtype of W and applies them in order to a weight in the target's view."""
    import torch

    device, dtype = W.device, W.dtype
    for update in updates:
        loaded = update.map(lambda leaf: as_torch(leaf, device, dtype))
        if not loaded.changes_weight:
            continue
        if stacked:
            W = torch.stack([loaded.expert(e).new_weight(W[e]) for e in range(W.shape[0])])
        else:
            W = loaded.new_weight(W)
    return W


def view_shape(target: Target, updates: Iterable[Update]) -> tuple[int, ...]:
    """The shape of the weight in the target's view, as far as the updates alone tell it.

    Raises:
        UsageError: they do not tell all of it.
    """
    dims: dict[str, Any] = {}
    for update in updates:
        dims |= update.dims(target.stacked)
    if "rest" in dims:
        return (*((dims["e"],) if target.stacked else ()), dims["out"], *dims["rest"])
    if "out" not in dims or "in" not in dims:
        raise UsageError("the shape of its weight is known to the base only", where=str(target), cure="Pass base=")
    return (*((dims["e"],) if target.stacked else ()), dims["out"], dims["in"], *dims.get("k", ()))


def _free_delta(found: Mapping[Target, tuple[Update, ...]]) -> torch.Tensor:
    import torch

    (target, updates), *_ = found.items()
    needy = next((u for us in found.values() for u in us if not isinstance(u, Additive)), None)
    if needy is not None:
        raise UsageError(f"the law of {needy.method} needs the weight", where=target.path, cure="Pass base=")
    zero = torch.zeros(view_shape(target, updates), dtype=torch.float64)
    return fold([u for us in found.values() for u in us], zero, target.stacked)


def _one_view(path: str, targets: Iterable[Target]) -> None:
    views = {(target.layout, target.rows) for target in targets}
    if len(views) > 1:
        raise UsageError("updates here see the weight in different layouts", where=path, cure="Merge them instead")


def _opened(base: Checkpoint | str | PathLike[str]) -> Checkpoint:
    from .tensors.checkpoint import Checkpoint, open_checkpoint

    return base if isinstance(base, Checkpoint) else open_checkpoint(base)


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


def _prefix_change(paths: list[str], shapes: Shapes) -> tuple[str, str] | None:
    """The one (taken off, added) prefix change that gives every path a place; None when none is needed or helps."""
    first = next((path for path in paths if _keys(path, shapes) is None), None)
    if first is None:
        return None
    working = {c for c in _prefix_candidates(first, shapes) if all(_keys(_rename(p, *c), shapes) for p in paths)}
    return working.pop() if len(working) == 1 else None


def _prefix_candidates(path: str, shapes: Shapes) -> Iterator[tuple[str, str]]:
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


def _with_layouts(sites: list[Site], shapes: Shapes, config: Mapping[str, Any] | None) -> list[Site]:
    fitting = [_fitting_layouts(site, shapes) for site in sites]
    proven = {(site.target.layout, fits[0]) for site, fits in zip(sites, fitting, strict=True) if len(fits) == 1}
    return [
        replace(site, target=replace(site.target, layout=_choose(site, fits, proven, config)))
        for site, fits in zip(sites, fitting, strict=True)
    ]


def _fitting_layouts(site: Site, shapes: Shapes) -> list[str]:
    if site.weight is None:
        return [site.target.layout]
    stacked = [layout for layout in LAYOUTS if layout.startswith("e ") == site.target.stacked]
    return [
        layout for layout in stacked if _fits(replace(site.target, layout=layout), site.updates, shapes[site.weight])
    ]


def _fits(target: Target, updates: tuple[Update, ...], shape: tuple[int, ...]) -> bool:
    seen = _viewed(shape, target)
    if seen is None:
        return False
    offset = int(target.stacked)
    for update in updates:
        dims = update.dims(target.stacked)
        if target.stacked and dims.get("e") != seen[0]:
            return False
        out, rest = seen[offset], seen[offset + 1 :]
        if target.rows is not None:
            out = target.rows[1] - target.rows[0] if target.rows[1] <= out else -1
        if dims.get("out", out) != out or not _rest_fits(dims, rest):
            return False
    return True


def _rest_fits(dims: Mapping[str, Any], rest: tuple[int, ...]) -> bool:
    if "rest" in dims:
        return bool(dims["rest"] == rest)
    if "in" not in dims:
        return True
    if not rest or dims["in"] != rest[0]:
        return False
    return "k" not in dims or dims["k"] == rest[1:] or (math.prod(dims["k"]) == 1 == math.prod(rest[1:]))


def _viewed(shape: tuple[int, ...], target: Target) -> tuple[int, ...] | None:
    if target.layout.startswith("out"):
        return shape or None
    if target.layout == "in out *k":
        return (shape[1], shape[0], *shape[2:]) if len(shape) > 1 else None
    if len(shape) < 3:
        return None
    return shape if target.layout == "e out *in" else (shape[0], shape[2], shape[1], *shape[3:])


def _choose(site: Site, fits: list[str], proven: set[tuple[str, str]], config: Mapping[str, Any] | None) -> str:
    declared = site.target.layout
    if len(fits) < 2:
        return fits[0] if fits else declared
    if declared in fits and _whole_only(site):
        return declared
    in_out = stored_in_out(site.target.path, config)
    if in_out:
        return next(layout for layout in fits if layout in ("in out *k", "e in out *k"))
    if in_out is None and any(said == declared and is_ != declared for said, is_ in proven):
        raise ShapeMismatch(
            "a square weight, stored [out, in] or [in, out], and the adapter's word is wrong for other weights",
            where=str(site.target),
            cure="Add the model_type of a known family to the base's config",
        )
    return declared


def _whole_only(site: Site) -> bool:
    """Whether the updates hold whole weights only: the declared layout is then the order of their own axes."""
    dims = [update.dims(site.target.stacked) for update in site.updates]
    return any("rest" in each for each in dims) and not any("in" in each for each in dims)


def _check_site(site: Site, shapes: Shapes) -> None:
    for update in site.updates:
        try:
            _check_update(update, site, shapes)
        except AdapterkitError as error:
            raise error.at(where=f"{site.target}: {update.method}") from None


def _check_update(update: Update, site: Site, shapes: Shapes) -> None:
    if update.changes_weight and site.weight is None:
        raise TargetNotFound("the base has no weight there, only a bias", cure=_WRONG_BASE)
    if site.weight is not None and not _fits(site.target, (update,), shapes[site.weight]):
        dims = update.dims(site.target.stacked)
        made_for = ", ".join(f"{name}={dims[name]}" for name in ("e", "out", "in", "k", "rest") if name in dims)
        raise ShapeMismatch(f"made for {made_for}; the base has {list(shapes[site.weight])}", cure=_WRONG_BASE)
    if site.bias is None and update.changes_bias and update.needs_bias:
        raise NotMergeable("changes a bias that the base does not have", cure="Inject it instead of merging")
    if site.bias is not None and update.changes_bias and not _bias_fits(update, site.target, shapes[site.bias]):
        out = update.dims(site.target.stacked).get("out")
        raise ShapeMismatch(f"made for {out} outputs; the bias is {list(shapes[site.bias])}", cure=_WRONG_BASE)
    seen = None if site.weight is None else _viewed(shapes[site.weight], site.target)
    if seen is not None:
        update.check_against(seen[int(site.target.stacked) :])


def _bias_fits(update: Update, target: Target, shape: tuple[int, ...]) -> bool:
    """Whether a bias is `[out]`, or `[e, out]` of stacked experts, with room for the target's rows."""
    dims = update.dims(target.stacked)
    lead = (dims["e"],) if target.stacked else ()
    if target.rows is not None:
        return shape[:-1] == lead and len(shape) > 0 and target.rows[1] <= shape[-1]
    return shape == (*lead, dims["out"])


_WRONG_BASE = "Is this the base that the adapter was trained on?"
