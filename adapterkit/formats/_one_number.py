"""Choose the single alpha or scaling of a file, and fold all other scalings into B."""

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
    """Return the alpha, the updates that a format with one alpha can express, and a line for each change.

    Args:
        adapter: the adapter to write.
        why: returns the reason why the format cannot express an update; empty if it can.
        dialect: the format's name, for messages.
        on_loss: how to treat updates that the format cannot express.
        first: the alpha in the source file, if known.
        one_rank: whether all modules must have the same rank.

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
    """Choose the alpha of a file whose scaling is alpha / rank; see `one_number`."""
    from .peft.alphas import exact_alpha

    def rank(update: Pair) -> int:
        # Read the rank from B, where it is always the last axis.
        return int(update.B.shape[-1])

    return one_number(
        pairs, lambda u: exact_alpha((rank(u), u.scaling), False), lambda alpha, u: alpha / rank(u),
        dialect=dialect, on_loss=on_loss, default=float(rank(next(iter(pairs.values())))), first=first,
    )  # fmt: skip


def of_one_rank(pairs: Pairs) -> Pairs:
    """Give all updates the same rank without changing their functions: pad smaller ranks with zeros."""
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
    """Choose the number that sets the scalings of all modules; fold all other scalings into B.

    Args:
        pairs: the updates.
        of: returns the number that yields an update's exact scaling, or None.
        gives: returns the scaling that a number yields for an update.
        dialect: the format's name, for messages.
        on_loss: `fold` or `promote` allows folding scalings.
        default: the number to use if `of` returns None for every update.
        first: the number in the source file; preferred if no other number fits more updates.

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
        raise Unrepresentable(f"{dialect} stores one scaling for all modules", items=items, cure=_ALLOW)
    changed = {t: folded(u, needy[t]) if t in needy else u for t, u in pairs.items()}
    return number, changed, [f"folded the scaling into B of {target}" for target in needy]


def of_no_number(pairs: Pairs, *, dialect: str, on_loss: str) -> tuple[Pairs, list[str]]:
    """Fold all scalings into B, for a format without scalings; return a line for each folded scaling.

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
    """Give an update another scaling without changing its function: multiply B by the quotient, rounded once."""
    if update.scaling == scaling:
        return update
    factor = update.scaling / scaling
    scaled = {name: times(as_lazy(update.tensors[name]), factor) for name in ("B", "bias") if name in update.tensors}
    return update.replace(scaling=scaling, **scaled)


def whole_number(value: float) -> float:
    """Return an integral value as an int, because tools write 16, not 16.0. Floats above 2**53 stay floats."""
    return int(value) if float(value).is_integer() and abs(value) < 1 << 53 else value


FOLDING = ("fold", "promote")
"""The values of `on_loss` that allow folding a scaling."""

_ALLOW = "Allow folding it into B with --on-loss fold (on_loss='fold')"
