"""Sums of additive updates at one place: thin factors beside one another, the rest as one dense difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..core.updates import Additive, Update
from ..io.computed import computed, joined, total, wide
from ..methods.dense import Dense
from ..methods.lora import LoRA
from .building import balanced, low_rank
from .lowering import Change
from .thin import svd

if TYPE_CHECKING:
    from ..io.computed import Array
    from .places import Place

    Term = tuple[Additive, float]


def added(place: Place, terms: Sequence[Term], stacking: bool) -> list[Update]:
    """Additive updates as one LoRA, and what has no thin factors as one dense difference, or apart when stacking."""
    thin: list[tuple[LoRA, float]] = []
    rest: list[Term] = []
    for update, weight in terms:
        lora = update if isinstance(update, LoRA) else _lora(place, update)
        thin += [] if lora is None else [(lora, weight)]
        rest += [(update, weight)] if lora is None else []
    made: list[Update] = []
    if thin:
        whole = len(place.shape) < 2 or sum(_rank(place, u) for u, _ in thin) > _most(place)
        made.append(_reduced(place, thin) if whole and not stacking else _beside(place, thin))
    if stacking:
        return made + [update.scaled(weight) or _dense(place, [(update, weight)]) for update, weight in rest]
    return made + ([_dense(place, rest)] if rest else [])


def _lora(place: Place, update: Additive) -> LoRA | None:
    """The LoRA that another method comes down to; None where it has no factors, or none that are thin."""
    if not update.changes_weight or type(update).pair is Additive.pair:
        return None
    change = Change(place.target, place.shape, (update,))
    deltas = list(change.deltas())
    if any(delta.rest is not None or delta.rank >= min(delta.shape) for delta in deltas):
        return None
    kind = wide(list(update.tensors.values()))
    return low_rank(place.target, place.shape, [(d.B, d.A) for d in deltas], change.bias(), kind)


def _beside(place: Place, terms: Sequence[tuple[LoRA, float]]) -> LoRA:
    """Factors beside one another; leaves stay unread."""
    stacked, shape = int(place.target.stacked), place.shape
    factors = [weight * update.scaling for update, weight in terms]
    # The largest, so that no ratio to it overflows.
    scaling = max(factors, key=abs) or 1.0
    ratios = [factor / scaling for factor in factors]
    lead = [u.A.shape[: 1 + stacked] for u, _ in terms]
    A = joined([u.A.reshape(*front, *shape[1:]) for (u, _), front in zip(terms, lead, strict=True)], stacked)
    B = joined([u.B for u, _ in terms], 1 + stacked, ratios)
    biases = [(u.bias, ratio) for (u, _), ratio in zip(terms, ratios, strict=True) if u.bias is not None]
    bias = total([leaf for leaf, _ in biases], [ratio for _, ratio in biases]) if biases else None
    return LoRA(A=A, B=B, bias=bias, scaling=scaling)  # type: ignore[arg-type]


def _reduced(place: Place, terms: Sequence[tuple[LoRA, float]]) -> LoRA:
    """The sum at the rank of the weight, worked out; for ranks that add up to more than that."""
    change = Change(place.target, place.shape, tuple(u.replace(scaling=w * u.scaling) for u, w in terms))
    pairs = [balanced(*svd(delta)) for delta in change.deltas()]
    kind = wide([leaf for update, _ in terms for leaf in update.tensors.values()])
    return low_rank(place.target, place.shape, pairs, change.bias(), kind)


def _dense(place: Place, terms: Sequence[Term]) -> Update:
    """The sum as one dense difference, worked out when it is read."""
    if len(terms) == 1 and isinstance(terms[0][0], Dense):
        update, weight = terms[0]
        return update.scaled(weight) or update
    kind = wide([leaf for update, _ in terms for leaf in update.tensors.values()])
    target, fields = place.target, {}
    changes = [Change(target, place.shape, (update,), weight) for update, weight in terms]
    if any(change.changes_weight for change in changes):
        lead = (changes[0].experts,) if target.stacked else ()
        fields["D"] = computed((*lead, *place.shape), kind, lambda: _whole(changes, (*lead, *place.shape)))
    if any(change.changes_bias for change in changes):
        lead = (changes[0].experts,) if target.stacked else ()
        fields["d"] = computed((*lead, place.shape[0]), kind, lambda: _biases(changes))
    return Dense(**fields)  # type: ignore[arg-type]


def _whole(changes: Sequence[Change], shape: tuple[int, ...]) -> Array:
    """The sum of changes, experts stacked; one of them in memory at a time beside the sum."""
    import numpy as np

    result = np.zeros(shape)
    slices = result if len(shape) > len(changes[0].shape) else [result]
    for change in changes:
        if change.changes_weight:
            for one, delta in zip(slices, change.deltas(), strict=True):
                one += delta.dense().reshape(change.shape)
    return result


def _biases(changes: Sequence[Change]) -> Array:
    found = [change.bias() for change in changes]
    summed: Array = sum(bias for bias in found if bias is not None)  # type: ignore[assignment]
    return summed


def _rank(place: Place, update: LoRA) -> int:
    return int(update.A.shape[int(place.target.stacked)])


def _most(place: Place) -> int:
    return min(place.shape[0], math.prod(place.shape[1:]))
