"""Choose the single alpha or scaling that a file stores for all modules, and fold all other scalings into B."""

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
    """Return the file's alpha, the updates that the format can express, and a line for each omitted or changed update.

    Args:
        adapter: the adapter to write.
        why: a function that returns the reason why the format cannot express an update; empty if it can.
        dialect: the format's name, for messages.
        on_loss: how to treat updates that the format cannot express.
        first: the alpha in the source file; None if unknown.
        one_rank: whether all modules must have the same rank.

    Raises:
        Unrepresentable: see `_pairs.expressible` and `one_number`.
    """
    pairs, lines = expressible(adapter, dialect, on_loss, why)
    held = of_one_rank(pairs) if one_rank else pairs
    alpha, held, folded = one_alpha(held, dialect=dialect, on_loss=on_loss, first=first)
    return alpha, held, lines + folded


def one_alpha(
    pairs: Mapping[Target, Pair], *, dialect: str, on_loss: str, first: float | None = None
) -> tuple[float, Pairs, list[str]]:
    """Choose the alpha of a file in which every module's scaling is alpha / rank; see `one_number`."""
    from .peft.alphas import exact_alpha

    def rank(update: Pair) -> int:
        # Read the rank from B, because the rank is always B's last axis.
        return int(update.B.shape[-1])

    return one_number(
        pairs, lambda u: exact_alpha((rank(u), u.scaling), False), lambda alpha, u: alpha / rank(u),
        dialect=dialect, on_loss=on_loss, default=float(rank(next(iter(pairs.values())))), first=first,
    )  # fmt: skip


def of_one_rank(pairs: Pairs) -> Pairs:
    """Give all updates the largest rank without changing their functions: pad the factors with zeros."""
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
    """Choose the value, such as an alpha, that determines the scalings of all modules; fold all other scalings into B.

    Args:
        pairs: the updates by target.
        of: a function that returns the value that yields exactly an update's scaling; None if there is no such value.
        gives: a function that returns the scaling that a value yields for an update.
        dialect: the format's name, for messages.
        on_loss: `fold` and `promote` allow folding scalings.
        default: the value to use if `of` returns None for every update.
        first: the value in the source file; chosen if no other value fits more updates.

    Raises:
        Unrepresentable: the updates need different values, and `on_loss` does not allow folding.
    """
    count = Counter(number for number in map(of, pairs.values()) if number)
    ranked = sorted(count, key=lambda number: (-count[number], number != first, -number))
    number = ranked[0] if ranked else default
    needy = {t: gives(number, u) for t, u in pairs.items() if gives(number, u) != u.scaling}
    if needy and on_loss not in FOLDING:
        items = [
            f"{target}: its scaling is {pairs[target].scaling:g}, not {value:g}" for target, value in needy.items()
        ]
        raise Unrepresentable(f"{dialect} stores one scaling for all modules", items=items, cure=_ALLOW)
    changed = {t: folded(u, needy[t]) if t in needy else u for t, u in pairs.items()}
    return number, changed, [f"folded the scaling into B of {target}" for target in needy]


def of_no_number(pairs: Pairs, *, dialect: str, on_loss: str) -> tuple[Pairs, list[str]]:
    """Fold every scaling into B, for a format that stores no scalings; return a line for each folded scaling.

    Raises:
        Unrepresentable: a scaling is not 1, and `on_loss` does not allow folding.
    """
    needy = [target for target, update in pairs.items() if update.scaling != 1]
    if needy and on_loss not in FOLDING:
        items = [f"{target}: its scaling is {pairs[target].scaling:g}" for target in needy]
        raise Unrepresentable(f"{dialect} stores no scaling", items=items, cure=_ALLOW)
    plain = {target: folded(update, 1.0) for target, update in pairs.items()}
    return plain, [f"folded the scaling into B of {target}" for target in needy]


def folded(update: Pair, scaling: float) -> Pair:
    """Give an update another scaling without changing its function: multiply B by old / new, and round once."""
    if update.scaling == scaling:
        return update
    factor = update.scaling / scaling
    scaled = {name: times(as_lazy(update.tensors[name]), factor) for name in ("B", "bias") if name in update.tensors}
    return update.replace(scaling=scaling, **scaled)


def whole_number(value: float) -> float:
    """Return a float without a fraction as an int, because tools write 16, not 16.0. Floats above 2**53 stay floats."""
    return int(value) if float(value).is_integer() and abs(value) < 1 << 53 else value


FOLDING = ("fold", "promote")
"""The values of `on_loss` that allow folding a scaling."""

_ALLOW = "Allow folding the scaling into B with --on-loss fold (on_loss='fold')"
