"""Compute the config fields for ranks and alphas: the most common values, and patterns for all other modules."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from .patterns import exactly

if TYPE_CHECKING:
    from ...io.strict_json import JsonValue

T = TypeVar("T", bound=float)

Scale = tuple[int, float]
"""The rank and the scaling of a module."""


def number_fields(scales: Mapping[str, Scale], rslora: Sequence[bool]) -> tuple[dict[str, JsonValue], list[str]]:
    """Choose the `use_rslora` for which most scalings have an exact alpha.

    Return the fields, and the modules whose scaling has no exact alpha.
    """
    tried = {flag: {name: exact_alpha(scale, flag) for name, scale in scales.items()} for flag in rslora}
    flag = min(tried, key=lambda flag: sum(alpha is None for alpha in tried[flag].values()))
    alphas = {name: alpha for name, alpha in tried[flag].items() if alpha is not None}
    r = _most_common([rank for rank, _ in scales.values()], 8)
    alpha = _most_common(list(alphas.values()), r)
    fields: dict[str, JsonValue] = {
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": flag,
        "rank_pattern": {exactly(name): rank for name, (rank, _) in scales.items() if rank != r},
        "alpha_pattern": {exactly(name): value for name, value in alphas.items() if value != alpha},
    }
    return fields, [name for name in scales if name not in alphas]


def exact_alpha(scale: Scale, rslora: bool) -> int | float | None:
    """Return the alpha for which PEFT computes exactly this scaling, preferably an integer; None if there is none."""
    rank, scaling = scale
    divisor = math.sqrt(rank) if rslora else rank
    # Convert to float first: a scaling may be a large integer, whose product with a rank would overflow.
    guess = float(scaling) * divisor
    return next((alpha for alpha in _candidates(guess) if alpha / divisor == scaling), None)


def _candidates(guess: float) -> Iterator[int | float]:
    if not math.isfinite(guess):
        return
    if abs(guess) < 1 << 53:
        yield round(guess)
    yield guess
    yield math.nextafter(guess, math.inf)
    yield math.nextafter(guess, -math.inf)


def _most_common(values: Sequence[T], default: T) -> T:
    count = Counter(values)
    return min(count, key=lambda value: (-count[value], value), default=default)
