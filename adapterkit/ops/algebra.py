"""Scale, negate, add, subtract, average and stack adapters exactly, on low-rank factors if possible."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..core.adapter import Adapter
from ..core.arguments import check_factor, checks_types, weights_of
from ..core.updates import Additive, Update
from ..errors import AdapterkitError, UsageError
from ..io.computed import computed, joined, rounded_lazy, total, wide
from ..linalg.namespace import summed
from ..methods.dense import Dense
from ..methods.lora import LoRA
from .alignment import AlignedPlace, places
from .lowering import Change, additive, balanced, check_kind, loaded, low_rank, of_several
from .lowrank import svd

if TYPE_CHECKING:
    from ..io.computed import Array
    from ..io.lazy import DType, Lazy
    from .alignment import AlignedPlace, Source
    from .lowering import Base

    Term = tuple[Additive, float]


def added(place: AlignedPlace, terms: Sequence[Term], stacking: bool) -> list[Update]:
    """Return the weighted sum of updates: one LoRA for all low-rank updates, and one dense difference for all others.

    If `stacking` is set, updates without low-rank factors are not summed: each is scaled and returned by itself.
    """
    thin: list[tuple[LoRA, float]] = []
    rest: list[Term] = []
    for update, weight in terms:
        lora = update if isinstance(update, LoRA) else _lora(place, update)
        thin += [] if lora is None else [(lora, weight)]
        rest += [(update, weight)] if lora is None else []
    updates_made: list[Update] = []
    if thin:
        # If the ranks of the LoRAs add up to more than min(out, in * k), reduce the sum's rank to min(out, in * k). The
        # reduction loses nothing, because no matrix of this shape has a larger rank. With `stacking`, keep the factors
        # as they are, because `stack` only concatenates them.
        ranks = [int(update.A.shape[int(place.target.stacked)]) for update, _ in thin]
        whole = len(place.shape) < 2 or sum(ranks) > min(place.shape[0], math.prod(place.shape[1:]))
        updates_made.append(_reduced(place, thin) if whole and not stacking else _beside(place, thin))
    if stacking:
        return updates_made + [update.scaled(weight) or _dense(place, [(update, weight)]) for update, weight in rest]
    return updates_made + ([_dense(place, rest)] if rest else [])


def _lora(place: AlignedPlace, update: Additive) -> LoRA | None:
    """Return an update as a LoRA; None if it has no low-rank factors, or if a dense difference is smaller."""
    if not update.changes_weight or type(update).pair is Additive.pair:
        return None
    change = Change(place.target, place.shape, (update,))
    deltas = list(change.deltas())
    # If the rank is at least min(out, in * k), the factors take more space than a dense difference.
    if any(delta.rest is not None or delta.rank >= min(delta.shape) for delta in deltas):
        return None
    kind = wide(list(update.tensors.values()))
    return low_rank(place.target, place.shape, [(d.B, d.A) for d in deltas], change.bias(), kind)


def _beside(place: AlignedPlace, terms: Sequence[tuple[LoRA, float]]) -> LoRA:
    """Join LoRAs into one by concatenating their factors, without reading any tensor."""
    stacked, shape = int(place.target.stacked), place.shape
    factors = [weight * update.scaling for update, weight in terms]
    # The joined LoRA gets the scaling with the largest magnitude. The other scalings are divided by it, so no ratio is
    # above 1 and none overflows.
    scaling = max(factors, key=abs) or 1.0
    ratios = [factor / scaling for factor in factors]
    lead = [u.A.shape[: 1 + stacked] for u, _ in terms]
    A = joined([u.A.reshape(*front, *shape[1:]) for (u, _), front in zip(terms, lead, strict=True)], stacked)
    B = joined([u.B for u, _ in terms], 1 + stacked, ratios)
    biases = [(u.bias, ratio) for (u, _), ratio in zip(terms, ratios, strict=True) if u.bias is not None]
    bias = total([leaf for leaf, _ in biases], [ratio for _, ratio in biases]) if biases else None
    return LoRA(A=A, B=B, bias=bias, scaling=scaling)  # type: ignore[arg-type]


def _reduced(place: AlignedPlace, terms: Sequence[tuple[LoRA, float]]) -> LoRA:
    """Return the sum of LoRAs as one LoRA, whose rank is at most min(out, in * k)."""
    change = Change(place.target, place.shape, tuple(u.replace(scaling=w * u.scaling) for u, w in terms))
    pairs = [balanced(*svd(delta)) for delta in change.deltas()]
    kind = wide([leaf for update, _ in terms for leaf in update.tensors.values()])
    return low_rank(place.target, place.shape, pairs, change.bias(), kind)


def _dense(place: AlignedPlace, terms: Sequence[Term]) -> Update:
    """Return the weighted sum of updates as one dense difference, which is computed when it is read."""
    if len(terms) == 1 and isinstance(terms[0][0], Dense):
        update, weight = terms[0]
        return update.scaled(weight) or update
    kind = wide([leaf for update, _ in terms for leaf in update.tensors.values()])
    target, fields = place.target, {}
    changes = [Change(target, place.shape, (update,), weight) for update, weight in terms]
    experts = changes[0].experts
    lead = () if experts is None else (experts,)
    if any(change.changes_weight for change in changes):
        # Do not compute the difference now: the dense differences of all targets together are as large as the model.
        fields["D"] = computed((*lead, *place.shape), kind, lambda: _whole(changes, (*lead, *place.shape)))
    if any(change.changes_bias for change in changes):
        fields["d"] = computed((*lead, place.shape[0]), kind, lambda: _biases(changes))
    return Dense(**fields)  # type: ignore[arg-type]


def _whole(changes: Sequence[Change], shape: tuple[int, ...]) -> Array:
    """Return the sum of changes as an array of shape `shape`, `[out, in, *k]` or `[experts, out, in, *k]`.

    Only the sum and the change of one expert are in memory at the same time.
    """
    import numpy as np

    result = np.zeros(shape)
    slices = result if len(shape) > len(changes[0].shape) else [result]
    for change in changes:
        if change.changes_weight:
            for one, delta in zip(slices, change.deltas(), strict=True):
                one += delta.dense().reshape(change.shape)
    return result


def _biases(changes: Sequence[Change]) -> Array:
    return summed(bias for change in changes if (bias := change.bias()) is not None)


# The public operations. The sum of adapters changes a weight W to W'. A merge of the same adapters into the base gives
# the same W':
#     W' = W + sum_i weight_i * (f_i(W) - W), where f_i(W) is the weight with adapter i alone
#
# Low-rank factors are joined: ranks add up, and no product is computed. PEFT's "linear" instead sums all A and all B
# separately, so its result also contains products `B_i @ A_j` of different adapters.


@checks_types
def scale(adapter: Source, factor: float, *, base: Base | None = None) -> Adapter:
    """Return the adapter that changes every weight `factor` times as much.

    Args:
        adapter: an adapter or its path.
        factor: any finite number.
        base: the base, for methods that need its weights.

    Raises:
        NotMergeable: a method does not change weights.
        UsageError: the factor is not finite; or a method needs the base's weights, but no base was given.
    """
    factor = check_factor(factor, "factor")
    (read,), aligned = places([adapter], base=base)
    updates = {place.target: summed_at(place, [factor], stacking=False) for place in aligned}
    return read.replace(updates=updates).step("scale", factor=factor)


@checks_types
def negate(adapter: Source, *, base: Base | None = None) -> Adapter:
    """Return the adapter with all its changes multiplied by -1; see `scale`."""
    return scale(adapter, -1.0, base=base)


@checks_types
def add(
    adapters: Sequence[Source],
    weights: Sequence[float] | None = None,
    *,
    base: Base | None = None,
    disjoint: bool = False,
) -> Adapter:
    """Return the exact sum of adapters. The ranks of LoRAs add up; changes without low-rank factors become dense.

    Args:
        adapters: adapters or their paths, of any methods, ranks and targets.
        weights: one factor per adapter; default: 1.
        base: the base. Names and layouts are resolved against the base, and some methods need its weights.
        disjoint: whether to allow adapters that have no target in common.

    Returns:
        the sum. A target that only one adapter changes keeps its method if the adapter's weight is 1, or if the method
        can scale its updates. Updates that are not additive also keep their method if all of them have the same method
        and this method can express their sum. All other targets get a LoRA, a dense difference, or both.

    Raises:
        UsageError: the number of weights differs from the number of adapters; the adapters have no target in common; or
            a method needs the base's weights, but no base was given.
        NotMergeable: a method does not change weights.
        ShapeMismatch: the adapters were made for weights of different shapes.
    """
    adapters = listed(adapters)
    return _combined("add", adapters, weights_of(weights, len(adapters)), base, disjoint, stacking=False)


@checks_types
def subtract(one: Source, other: Source, *, base: Base | None = None, disjoint: bool = False) -> Adapter:
    """Subtract the changes of the adapter `other` from the changes of the adapter `one`; see `add`."""
    return add([one, other], [1.0, -1.0], base=base, disjoint=disjoint)


@checks_types
def average(
    adapters: Sequence[Source],
    weights: Sequence[float] | None = None,
    *,
    base: Base | None = None,
    disjoint: bool = False,
) -> Adapter:
    """Return the weighted mean of adapters; see `add`. If an adapter lacks a target, its change there counts as 0.

    Raises:
        UsageError: the weights sum to 0. `add` lists the other errors.
    """
    adapters = listed(adapters)
    chosen = weights_of(weights, len(adapters))
    # Divide by a power of two first, which is exact: the sum of weights such as 1e308 is larger than any float.
    power = math.frexp(max(map(abs, chosen), default=0.0))[1]
    chosen = [math.ldexp(weight, -power) for weight in chosen]
    whole = math.fsum(chosen)
    if whole == 0:
        raise UsageError("the weights sum to 0", cure="Choose weights whose sum is not 0, or use ak.ops.add")
    return _combined("average", adapters, [w / whole for w in chosen], base, disjoint, stacking=False)


@checks_types
def stack(
    adapters: Sequence[Source],
    weights: Sequence[float] | None = None,
    *,
    base: Base | None = None,
    disjoint: bool = False,
) -> Adapter:
    """Join adapters: concatenate low-rank factors, and keep additive updates without low-rank factors separate.

    LoRAs are concatenated without reading their tensors. The ranks add up, even to more than min(out, in * k). The
    result computes the same function as the result of `add`. Updates that are not additive are combined as in `add`,
    but prompts and other contexts are concatenated if all weights are 1.

    Raises:
        AdapterkitError: as for `add`.
    """
    adapters = listed(adapters)
    return _combined("stack", adapters, weights_of(weights, len(adapters)), base, disjoint, stacking=True)


def _combined(
    op: str, adapters: Sequence[Source], weights: list[float], base: Base | None, disjoint: bool, *, stacking: bool
) -> Adapter:
    read, aligned = places(adapters, base=base, disjoint=disjoint)
    updates = {place.target: summed_at(place, weights, stacking) for place in aligned}
    return of_several(read, updates, op, weights=weights)


def summed_at(place: AlignedPlace, weights: Sequence[float], stacking: bool) -> tuple[Update, ...]:
    """Return the sum of several adapters' updates at one target."""
    try:
        parts = [_parted(updates, weight) for updates, weight in zip(place.updates, weights, strict=True) if updates]
        heads = [(head, weight) for head, _, weight in parts if head]
        heads_mixed, lowered = _mixed(place, heads, stacking)
        terms = [(update, weight) for _, tail, weight in parts for update in tail] + lowered
        return (*heads_mixed, *(_alone(place, terms) if len(parts) == 1 else added(place, terms, stacking)))
    except AdapterkitError as error:
        raise error.at(where=str(place.target)) from None


def _parted(group: Sequence[Update], weight: float) -> tuple[tuple[Update, ...], tuple[Additive, ...], float]:
    """Split an adapter's updates of one target into two groups; return (first group, second group, `weight`).

    The first group ends with the last update that is not additive. The second group contains the additive updates after
    that update.
    """
    last = max((i + 1 for i, update in enumerate(group) if not isinstance(update, Additive)), default=0)
    return tuple(group[:last]), tuple(u for u in group[last:] if isinstance(u, Additive)), weight


def _mixed(
    place: AlignedPlace, heads: Sequence[tuple[tuple[Update, ...], float]], stacking: bool
) -> tuple[tuple[Update, ...], list[Term]]:
    """Combine the first groups that `_parted` returns for several adapters.

    `heads` contains a pair (first group, weight) for each adapter whose first group is not empty.

    Return (combined updates, []) if the updates' method can express the combination. Otherwise, replace the groups by
    additive updates, and return ((), terms). Each term is a pair (additive update, weight).
    """
    if not heads or (len(heads) == 1 and heads[0][1] == 1):
        return heads[0][0] if heads else (), []
    updates, weights = [head for head, _ in heads], [weight for _, weight in heads]
    every = [update for head in updates for update in head]
    if stacking and all(u.kind == "context" for u in every) and all(w == 1 for w in weights):
        return tuple(every), []
    # First refuse updates that can never be summed. Then try to express the sum as one update of the same method,
    # because this needs no base. Require the base only if the method cannot express the sum.
    for update in every:
        check_kind(update, place.target, True, _DOING)
    mixture = _mixture(place, updates, weights)
    if mixture is not None:
        return (mixture,), []
    for update in every:
        check_kind(update, place.target, place.base is not None, _DOING)
    parts = [additive(Adapter({place.target: head}), place.base, _DOING) for head in updates]
    return (), [(u, w) for a, w in zip(parts, weights, strict=True) for _, u in a if isinstance(u, Additive)]


def _mixture(place: AlignedPlace, updates: Sequence[tuple[Update, ...]], weights: Sequence[float]) -> Update | None:
    """Return the weighted sum of the adapters' updates as one update that has the same method as these updates.

    Return None if the updates have different methods, if an adapter has several updates, or if the method cannot
    express the sum as one update.
    """
    methods = {type(update) for head in updates for update in head}
    if len(methods) > 1 or any(len(head) > 1 for head in updates):
        return None
    ready = [loaded(head[0], place.target) for head in updates]
    mixed: Any = methods.pop().mixed(ready, list(weights))  # type: ignore[attr-defined]
    kind = wide([leaf for head in updates for leaf in head[0].tensors.values()])
    return None if mixed is None else mixed.map(lambda values: _stored(values, kind))


def _stored(values: Array, kind: DType) -> Lazy:
    from ..io.lazy import from_numpy

    return rounded_lazy(values, kind) if values.dtype.kind == "f" else from_numpy(values)


def _alone(place: AlignedPlace, terms: Sequence[Term]) -> list[Update]:
    """Scale one adapter's additive updates. An update that cannot be scaled becomes a LoRA or a dense difference."""
    updates_made: list[Update] = []
    for update, weight in terms:
        scaled = update if weight == 1 else update.scaled(weight)
        updates_made += added(place, [(update, weight)], stacking=True) if scaled is None else [scaled]
    return updates_made


def listed(adapters: Iterable[Source]) -> list[Source]:
    """Return adapters as a list; they may come from an iterator, which can be read only once.

    Raises:
        UsageError: a single adapter was given. An adapter is an iterable, too, so the check of types lets it pass.
    """
    if isinstance(adapters, Adapter):
        raise UsageError(
            "a single adapter was given instead of a list", where="adapters", cure="Pass a list of adapters"
        )
    return list(adapters)


_DOING = "scaled or added"
