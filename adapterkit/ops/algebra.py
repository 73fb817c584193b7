"""Exact algebra of adapters: scale, negate, add, subtract, average, stack; of factors, mostly without a base.

A sum means what merging several adapters means: W' = W + sum_i weight_i * (f_i(W) - W). Thin factors are put beside one
another, so that ranks add up and nothing is computed before it is read; PEFT's "linear" sums A and B apart, which adds
products B_i @ A_j that belong to nobody.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..core.adapter import Adapter
from ..core.updates import Additive, Update
from ..errors import AdapterkitError, UsageError
from ..io.computed import held, wide
from .at_base import additive, check_kind
from .building import of_several
from .lowering import loaded
from .places import Place, places
from .terms import added

if TYPE_CHECKING:
    from .lowering import Base
    from .places import Source
    from .terms import Term


def scale(adapter: Source, factor: float, *, base: Base | None = None) -> Adapter:
    """The adapter that changes every weight `factor` times as much.

    Args:
        adapter: an adapter or its path.
        factor: any finite number.
        base: for laws that need its weights.

    Raises:
        NotMergeable: a law is not one of weights.
        UsageError: a law needs the weights and no base was given; the factor is not finite.
    """
    _check_weights([factor], 1)
    (read,), found = places([adapter], base=base)
    updates = {place.target: summed_at(place, [factor], stacking=False) for place in found}
    return read.replace(updates=updates).step("scale", factor=float(factor))


def negate(adapter: Source, *, base: Base | None = None) -> Adapter:
    """The adapter that takes away what this one adds; see `scale`."""
    return scale(adapter, -1.0, base=base)


def add(
    adapters: Sequence[Source],
    weights: Sequence[float] | None = None,
    *,
    base: Base | None = None,
    disjoint: bool = False,
) -> Adapter:
    """The sum of adapters, exactly: ranks add up, to what the weight has at most; what has no factors is summed whole.

    Args:
        adapters: adapters or their paths, of any methods, ranks and targets.
        weights: one factor an adapter; 1 for each when not given.
        base: settles names and layouts, and is what laws that need weights are taken at.
        disjoint: adapters that share no target are meant to.

    Returns:
        at each target the methods that were there where one adapter has it alone, else a LoRA, a dense rest, or both.

    Raises:
        UsageError: weights do not match the adapters; no common targets; a law needs the weights and there is no base.
        NotMergeable: a law is not one of weights.
        ShapeMismatch: adapters are of different weights.
    """
    return _combined("add", adapters, _checked(weights, adapters), base, disjoint, stacking=False)


def subtract(one: Source, other: Source, *, base: Base | None = None, disjoint: bool = False) -> Adapter:
    """What `one` adds, less what `other` adds; see `add`."""
    return add([one, other], [1.0, -1.0], base=base, disjoint=disjoint)


def average(
    adapters: Sequence[Source],
    weights: Sequence[float] | None = None,
    *,
    base: Base | None = None,
    disjoint: bool = False,
) -> Adapter:
    """The weighted mean of adapters; one that lacks a target counts as no change there. See `add`.

    Raises:
        UsageError: the weights sum to 0.
    """
    chosen = _checked(weights, adapters)
    whole = math.fsum(chosen)
    if whole == 0:
        raise UsageError("the weights sum to 0", cure="Choose weights with a sum, or add")
    return _combined("average", adapters, [w / whole for w in chosen], base, disjoint, stacking=False)


def stack(
    adapters: Sequence[Source],
    weights: Sequence[float] | None = None,
    *,
    base: Base | None = None,
    disjoint: bool = False,
) -> Adapter:
    """Adapters put beside one another: ranks add up whatever they are, and what has no thin factors is kept apart.

    The same function as `add`, whatever the ranks; prompts and other contexts are put behind one another.

    Raises:
        AdapterkitError: as `add`.
    """
    return _combined("stack", adapters, _checked(weights, adapters), base, disjoint, stacking=True)


def _combined(
    op: str, adapters: Sequence[Source], weights: list[float], base: Base | None, disjoint: bool, *, stacking: bool
) -> Adapter:
    read, found = places(adapters, base=base, disjoint=disjoint)
    updates = {place.target: summed_at(place, weights, stacking) for place in found}
    return of_several(read, updates, op, weights=weights)


def summed_at(place: Place, weights: Sequence[float], stacking: bool) -> tuple[Update, ...]:
    """The sum at one target."""
    try:
        held_ = [_parted(found, weight) for found, weight in zip(place.updates, weights, strict=True) if found]
        heads = [(head, weight) for head, _, weight in held_ if head]
        lawful, lowered = _mixed(place, heads, stacking)
        terms = [(update, weight) for _, tail, weight in held_ for update in tail] + lowered
        return (*lawful, *(_alone(place, terms) if len(held_) == 1 else added(place, terms, stacking)))
    except AdapterkitError as error:
        raise error.at(where=str(place.target)) from None


def _parted(found: Sequence[Update], weight: float) -> tuple[tuple[Update, ...], tuple[Additive, ...], float]:
    """Updates up to the last that is not additive, and the additive ones behind, whose change is its own."""
    last = max((i + 1 for i, update in enumerate(found) if not isinstance(update, Additive)), default=0)
    return tuple(found[:last]), tuple(u for u in found[last:] if isinstance(u, Additive)), weight


def _mixed(
    place: Place, heads: Sequence[tuple[tuple[Update, ...], float]], stacking: bool
) -> tuple[tuple[Update, ...], list[Term]]:
    """The weighted mixture of laws that are not additive, and what of it became additive at the base."""
    if not heads or (len(heads) == 1 and heads[0][1] == 1):
        return heads[0][0] if heads else (), []
    updates, weights = [head for head, _ in heads], [weight for _, weight in heads]
    every = [update for head in updates for update in head]
    if stacking and all(u.kind == "context" for u in every) and all(w == 1 for w in weights):
        return tuple(every), []
    for update in every:
        check_kind(update, place.target, True, _DOING)
    mixture = _mixture(place, updates, weights)
    if mixture is not None:
        return (mixture,), []
    for update in every:
        check_kind(update, place.target, place.base is not None, _DOING)
    parts = [additive(Adapter({place.target: head}), place.base, _DOING) for head in updates]
    return (), [(u, w) for a, w in zip(parts, weights, strict=True) for _, u in a if isinstance(u, Additive)]


def _mixture(place: Place, updates: Sequence[tuple[Update, ...]], weights: Sequence[float]) -> Update | None:
    """One update of the method that all share, where the method can say it."""
    methods = {type(update) for head in updates for update in head}
    if len(methods) > 1 or any(len(head) > 1 for head in updates):
        return None
    ready = [loaded(head[0], place.target) for head in updates]
    made: Any = methods.pop().mixed(ready, list(weights))  # type: ignore[attr-defined]
    kind = wide([leaf for head in updates for leaf in head[0].tensors.values()])
    return None if made is None else made.map(lambda values: _stored(values, kind))


def _stored(values: Any, kind: Any) -> Any:
    from ..io.lazy import from_numpy

    return held(values, kind) if values.dtype.kind == "f" else from_numpy(values)


def _alone(place: Place, terms: Sequence[Term]) -> list[Update]:
    """One adapter's additive updates, each of its own method where that can be scaled."""
    made: list[Update] = []
    for update, weight in terms:
        scaled = update if weight == 1 else update.scaled(weight)
        made += added(place, [(update, weight)], stacking=True) if scaled is None else [scaled]
    return made


def _checked(weights: Sequence[float] | None, adapters: Sequence[Source]) -> list[float]:
    if isinstance(adapters, (str, Adapter)):
        raise UsageError("one adapter where a list belongs", cure="Pass a list of adapters")
    chosen = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    _check_weights(chosen, len(adapters))
    return chosen


def _check_weights(weights: Sequence[float], count: int) -> None:
    if len(weights) != count:
        raise UsageError(f"{len(weights)} weights for {count} adapters", cure="Give one weight an adapter")
    if not all(math.isfinite(weight) for weight in weights):
        raise UsageError(f"weights {list(weights)} are not all finite", cure="Give each adapter a number")


_DOING = "scaled or added"
