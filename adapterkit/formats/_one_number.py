"""Choose the one number that a file has for the scalings of all modules, and fold the scalings that do not fit it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..errors import Unrepresentable
from ..io.arrange import times
from ..io.lazy import as_lazy
from ._pairs import expressible, rank_of, to_rank

if TYPE_CHECKING:
    from ..core.adapter import Adapter, Target
    from ._pairs import Pair, Pairs


def of_one_alpha(
    adapter: Adapter,
    why: Callable[[Target, Pair], str],
    *,
    dialect: str,
    on_loss: str,
    first: float | None = None,
    one_rank: bool = False,
) -> tuple[float, Pairs, list[str]]:
    """Return what a format with one alpha can express of an adapter: alpha, updates, and a line for each change.

    Args:
        adapter: the adapter to write.
        why: returns the reason against an update; empty if there is none.
        dialect: the format's name, for messages.
        on_loss: what to do with updates that it cannot express.
        first: the alpha that was read.
        one_rank: all modules must have the same rank.

    Raises:
        Unrepresentable: see `expressible` and `one_number`.
    """
    pairs, lines = expressible(adapter, dialect, on_loss, why)
    held = of_one_rank(pairs) if one_rank else pairs
    alpha, held, folded = one_alpha(held, dialect=dialect, on_loss=on_loss, first=first)
    return alpha, held, lines + folded


def one_alpha(
    pairs: Mapping[Target, Pair], *, dialect: str, on_loss: str, first: float | None = None
) -> tuple[float, Pairs, list[str]]:
    """Choose the one alpha of a file whose scaling is alpha / rank; see `one_number`."""
    from .peft.alphas import exact_alpha

    def rank(update: Pair) -> int:
        return int(update.B.shape[-1])  # B alone has no kernel behind its rank, and stacks have experts before it

    return one_number(
        pairs, lambda u: exact_alpha((rank(u), u.scaling), False), lambda alpha, u: alpha / rank(u),
        dialect=dialect, on_loss=on_loss, default=float(rank(next(iter(pairs.values())))), first=first,
    )  # fmt: skip


def of_one_rank(pairs: Pairs) -> Pairs:
    """Give all updates the same rank without changing the functions: smaller ranks are padded with zeros."""
    rank = max(map(rank_of, pairs.values()))
    return {target: to_rank(update, rank) for target, update in pairs.items()}


def one_number(
    pairs: Mapping[Target, Pair],
    of: Callable[[Pair], float | None],
    gives: Callable[[float, Pair], float],
    *,
    dialect: str,
    on_loss: str,
    default: float,
    first: float | None = None,
) -> tuple[float, Pairs, list[str]]:
    """Choose the one number for the scalings of all modules; scalings that it does not give are folded into B.

    Args:
        pairs: the updates.
        of: returns the number that gives exactly an update's scaling; None if there is none.
        gives: returns the scaling that a number gives.
        dialect: the format's name, for messages.
        on_loss: whether scalings may be folded.
        default: the number if there is none for any update.
        first: the number that was read; preferred if it fits as many updates as any other.

    Raises:
        Unrepresentable: scalings differ and `on_loss` does not allow folding.
    """
    count = Counter(number for number in map(of, pairs.values()) if number)
    ranked = sorted(count, key=lambda number: (-count[number], number != first, -number))
    number = ranked[0] if ranked else default
    needy = {t: gives(number, u) for t, u in pairs.items() if gives(number, u) != u.scaling}
    if needy and on_loss not in FOLDING:
        items = [
            f"{target}: its scaling is {pairs[target].scaling:g}, not {value:g}" for target, value in needy.items()
        ]
        raise Unrepresentable(f"{dialect} has one number for all", items=items, cure=_ALLOW)
    changed = {t: folded(u, needy[t]) if t in needy else u for t, u in pairs.items()}
    return number, changed, [f"folded the scaling into B of {target}" for target in needy]


def of_no_number(pairs: Pairs, *, dialect: str, on_loss: str) -> tuple[Pairs, list[str]]:
    """Fold all scalings into B, for a format without scalings; return a line for each that was folded.

    Raises:
        Unrepresentable: a scaling is not 1, and `on_loss` does not allow folding.
    """
    needy = [target for target, update in pairs.items() if update.scaling != 1]
    if needy and on_loss not in FOLDING:
        items = [f"{target}: its scaling is {pairs[target].scaling:g}" for target in needy]
        raise Unrepresentable(f"{dialect} has the scaling inside B", items=items, cure=_ALLOW)
    plain = {target: folded(update, 1.0) for target, update in pairs.items()}
    return plain, [f"folded the scaling into B of {target}" for target in needy]


def folded(update: Pair, scaling: float) -> Pair:
    """Give an update another scaling without changing its function; the quotient goes into B, rounded once."""
    if update.scaling == scaling:
        return update
    factor = update.scaling / scaling
    scaled = {name: times(as_lazy(update.tensors[name]), factor) for name in ("B", "bias") if name in update.tensors}
    return update.replace(scaling=scaling, **scaled)


def whole_number(value: float) -> float:
    """Return an int if the number is whole, as tools write it: 16, not 16.0; only while a float holds every integer."""
    return int(value) if float(value).is_integer() and abs(value) < 1 << 53 else value


FOLDING = ("fold", "promote")
"""Values of `on_loss` that allow folding a scaling."""

_ALLOW = "Allow it with on_loss='fold'/--on-loss fold"
