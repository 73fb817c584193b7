"""Compute the full difference W' - W of one weight, for inspection and checks; merges do not use this module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ...core.adapter import Adapter, Target
from ...core.updates import Additive, Update
from ...errors import NotMergeable, UsageError
from ...io.checkpoint import opened
from ...io.lazy import as_torch, for_formulas
from ..ties import aliases
from .fitting import viewed

if TYPE_CHECKING:
    import torch

    from ...io.checkpoint import Checkpoint

A = TypeVar("A")
"""A numpy array or torch tensor."""


def delta(adapter: Adapter, path: str, base: Checkpoint | str | PathLike[str] | None) -> torch.Tensor:
    """Return W' - W of the weight `path` in float32, with axes `[out, in, *k]`; see `Adapter.delta`."""
    import torch

    _refuse_other_laws(path, adapter.find(path))
    if base is None:
        found = adapter.find(path)
        _one_view(path, found)
        return _free_delta(found).float()
    from . import bind

    part = adapter.replace(updates=adapter.find(path))
    checkpoint = opened(base)
    sites = bind(part, checkpoint).sites
    _one_view(path, [site.target for site in sites])
    weight = sites[0].weight
    if weight is None:
        raise NotMergeable("the update changes only a bias", where=path, cure="There is no weight difference to return")
    W = view(as_torch(checkpoint.tensors[weight], dtype=torch.float64), sites[0].target)
    return (fold([u for site in sites for u in site.updates], W, sites[0].target.stacked) - W).float()


def _refuse_other_laws(path: str, found: Mapping[Target, tuple[Update, ...]]) -> None:
    other = next((u for updates in found.values() for u in updates if u.kind not in ("additive", "weight")), None)
    if other is not None:
        why = f"{other.method} changes {other.acts_on}, not weights"
        raise NotMergeable(why, where=path or "(model)", cure="Inject it into a live model instead")


def view(W: A, target: Target, bias: bool = False) -> A:
    """Return a stored weight with the axes that updates use, `[out, in, *k]` or `[e, out, in, *k]`, without a copy.

    Args:
        W: a numpy array or torch tensor as stored.
        target: the target, which says the order of the stored axes, and the rows that the updates use.
        bias: whether W is a bias.
    """
    seen: Any = W
    if bias:
        seen = seen if target.rows is None else seen[..., slice(*target.rows)]
        return cast("A", seen)
    if target.layout == "in out *k":
        seen = seen.swapaxes(0, 1)
    elif target.layout == "e in out *k":
        seen = seen.swapaxes(1, 2)
    if target.rows is not None:
        rows = slice(*target.rows)
        seen = seen[:, rows] if target.stacked else seen[rows]
    return cast("A", seen)


def fold(updates: Iterable[Update], W: torch.Tensor, stacked: bool) -> torch.Tensor:
    """Load the updates in the dtype of W and apply them in order to W, whose axes are those of `view`."""
    import torch

    device, dtype = W.device, W.dtype
    for update in updates:
        loaded = update.map(lambda leaf: for_formulas(leaf, device, dtype))
        if not loaded.changes_weight:
            continue
        if stacked:
            W = torch.stack([loaded.expert(e).new_weight(W[e]) for e in range(W.shape[0])])
        else:
            W = loaded.new_weight(W)
    return W


def view_shape(target: Target, updates: Iterable[Update]) -> tuple[int, ...]:
    """Return the weight's shape with the axes of `view`, deduced from the updates alone.

    Raises:
        UsageError: the updates do not show the whole shape.
    """
    dims: dict[str, Any] = {}
    for update in updates:
        dims |= update.dims(target.stacked)
    if "rest" in dims:
        return (*((dims["e"],) if target.stacked else ()), dims["out"], *dims["rest"])
    if "out" in dims and "in" not in dims and "columns" in dims:
        return (*((dims["e"],) if target.stacked else ()), dims["out"], dims["columns"])
    if "out" not in dims or "in" not in dims:
        raise UsageError(
            "only the base shows the shape of this weight", where=str(target), cure="Give the base with --base (base=)"
        )
    return (*((dims["e"],) if target.stacked else ()), dims["out"], dims["in"], *dims.get("k", ()))


def weight_shape(
    target: Target, updates: Sequence[Update], base: Checkpoint | str | PathLike[str] | None
) -> tuple[int, ...] | None:
    """Return the shape of a target's weight, from the base if `base` is not None, or else from the updates.

    Returns:
        `[out, in, *k]`, without the axis of experts; `[out]` if only a bias is changed; None if unknown.
    """
    if base is not None:
        checkpoint = opened(base)
        names = aliases(checkpoint)
        keys = (names.get(key, key) for key in (f"{target.path}.weight", target.path))
        stored = next((checkpoint.tensors[key] for key in keys if key in checkpoint.tensors), None)
        seen = None if stored is None else viewed(stored.shape, target)
        if seen is not None:
            rows = target.rows
            shape = seen[int(target.stacked) :]
            return shape if rows is None else (rows[1] - rows[0], *shape[1:])
    if not any(update.changes_weight for update in updates):
        # Use `get`, because output and context updates have no axis `out`.
        out = updates[0].dims(target.stacked).get("out")
        return None if out is None else (int(out),)  # type: ignore[arg-type]
    try:
        return view_shape(target, [update for update in updates if update.changes_weight])[int(target.stacked) :]
    except UsageError:
        return None


def _free_delta(found: Mapping[Target, tuple[Update, ...]]) -> torch.Tensor:
    import torch

    (target, updates), *_ = found.items()
    needy = next((u for us in found.values() for u in us if not isinstance(u, Additive)), None)
    if needy is not None:
        why = f"the formula of {needy.method} needs the weight"
        raise UsageError(why, where=target.path, cure="Give the base with --base (base=)")
    zero = torch.zeros(view_shape(target, updates), dtype=torch.float64)
    return fold([u for us in found.values() for u in us], zero, target.stacked)


def _one_view(path: str, targets: Iterable[Target]) -> None:
    views = {(target.layout, target.rows) for target in targets}
    if len(views) > 1:
        raise UsageError(
            "the updates have different layouts or rows of this weight", where=path, cure="Merge them instead"
        )
