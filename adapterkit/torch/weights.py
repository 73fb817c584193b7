"""Compute stored parameters after updates, for merging and for modules that must run under their own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..core.adapter import Target
from ..core.updates import Update
from ..io.lazy import for_formulas
from ..naming.binding import fold, view

Change = tuple[float, Sequence[tuple[Target, Sequence[Update]]]]
"""(weight of the adapter, its targets at one parameter, each with its updates in the order of application)."""

Formula = Callable[[Tensor, Target, Sequence[Update]], Tensor]
"""A function that applies the updates of one target to a stored weight or bias."""


def tensor_at(module: nn.Module, path: str) -> Tensor:
    """Return a parameter or buffer by its dotted path."""
    owner, _, name = path.rpartition(".")
    found: Tensor = getattr(module.get_submodule(owner), name)
    return found


def changed_weight(W: Tensor, changes: Iterable[Change]) -> Tensor:
    """Return W + sum of weight * (f(W) - W), in the stored layout; each f sees the weight without other adapters."""
    return _mixed(W, changes, _weight)


def changed_bias(b: Tensor, changes: Iterable[Change]) -> Tensor:
    """Return b + sum of weight * (g(b) - b), in the stored layout."""
    return _mixed(b, changes, _bias)


def settled(updates: Iterable[Update], W: Tensor, target: Target) -> tuple[Update, ...]:
    """Return the updates after evaluating their changes to the bias that depend on the weight.

    Each update sees the weight after the updates before it.
    """
    done, seen = [], view(W, target)
    for update in updates:
        loaded = update.map(lambda leaf: for_formulas(leaf, W.device, W.dtype))
        done.append(loaded.settled_at(seen, target.stacked))
        seen = fold((loaded,), seen, target.stacked)
    return tuple(done)


def _mixed(before: Tensor, changes: Iterable[Change], formula: Formula) -> Tensor:
    after = before
    for weight, targets in changes:
        new = before
        for target, updates in targets:
            new = formula(new, target, updates)
        after = new if after is before and weight == 1 else after + weight * (new - before)
    return after


def _weight(W: Tensor, target: Target, updates: Sequence[Update]) -> Tensor:
    if target.rows is not None:
        whole = W.clone()
        view(whole, target).copy_(fold(updates, view(W, target), target.stacked))
        return whole
    new = fold(updates, view(W, target), target.stacked)
    return view(new, target)


def _bias(b: Tensor, target: Target, updates: Sequence[Update]) -> Tensor:
    part = b if target.rows is None else b[..., slice(*target.rows)]
    for update in updates:
        loaded = update.map(lambda leaf: for_formulas(leaf, b.device, b.dtype))
        if target.stacked:
            part = torch.stack([loaded.expert(e).new_bias(part[e]) for e in range(len(part))])
        else:
            part = loaded.new_bias(part)
    if target.rows is None:
        return part
    whole = b.clone()
    whole[..., slice(*target.rows)] = part
    return whole
