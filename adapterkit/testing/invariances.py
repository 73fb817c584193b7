"""Measure the rank of a combiner's result, and whether the result depends on more than the weight changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..core.adapter import Adapter, Target
from ..io.lazy import from_numpy
from ..methods import METHODS
from ..ops import COMBINERS, combine
from ..ops.algebra import scale

if TYPE_CHECKING:
    from ..io.computed import Array

    Guise = Callable[[list[Adapter], int], tuple[list[Adapter], int]]

TARGET = Target("layers.0.q")
OUT, IN, RANK = 20, 28, 3
SMALL = 2.0**-17
"""The factor that makes weight changes small: a power of two, which does not affect rounding."""

SAME = 1e-6
"""Results count as equal if their difference, relative to the largest entry, is at most this."""


def dependences(name: str, draws: int = 4, **options: Any) -> set[str]:
    """Return the properties of the input that affect the result although the weight changes stay the same.

    Args:
        name: the name of the combiner.
        draws: the number of random sets of adapters to compare. A property is returned if it affects one result.
        options: further arguments of `adapterkit.combine`.
    """
    found = set()
    for drawn in range(draws):
        given = _adapters(name, drawn)
        first = _change(combine(given, name, seed=0, **options))
        for what, guise in GUISES.items():
            others, seed = guise(given, 1)
            again = _change(combine(others, name, seed=seed, **options)) / (SMALL if what == "size" else 1.0)
            if abs(again - first).max() > SAME * abs(first).max():
                found.add(what)
    return found


def rank_of_result(name: str, **options: Any) -> str:
    """Return a bound of the result's rank: `one's` (the rank of one adapter), the `sum` of the ranks, or `more`."""
    import numpy as np

    given = _adapters(name, 0)
    # Also use density 1: with lower densities, a small matrix can have a low rank by chance, unlike a large matrix.
    dense = {"density": 1.0} if "density" in COMBINERS[name].parameters() else {}
    changes = [_change(combine(given, name, **{**options, **more})) for more in ({}, dense)]
    found = max(int(np.linalg.matrix_rank(change)) for change in changes)
    return "one's" if found <= RANK else "sum" if found <= RANK * len(given) else "more"


def _turned(adapter: Adapter, seed: int) -> Adapter:
    """Return an adapter with the same weight changes, but with other factors."""
    import numpy as np

    R = np.random.default_rng(seed).normal(size=(RANK, RANK)) + 2 * np.eye(RANK)
    update: Any = adapter.updates[TARGET][0]
    A, B = np.linalg.solve(R, update.A.numpy()), update.B.numpy() @ R
    return adapter.replace(updates={TARGET: (update.replace(A=from_numpy(A), B=from_numpy(B)),)})


GUISES: Mapping[str, Guise] = {
    "factors": lambda given, _: ([_turned(adapter, t) for t, adapter in enumerate(given)], 0),
    "order": lambda given, _: (given[::-1], 0),
    "size": lambda given, _: ([scale(adapter, SMALL) for adapter in given], 0),
    "seed": lambda given, seed: (given, seed),
}
"""Property -> a function that returns adapters and a seed that differ only in this property; `size` scales changes."""


def _adapters(name: str, drawn: int) -> list[Adapter]:
    """Return random LoRAs in float64: three, or the number that the combiner needs."""
    import numpy as np

    made = []
    for t in range(COMBINERS[name].takes[1] or 3):
        rng = np.random.default_rng([drawn, t])
        factors = {"A": from_numpy(rng.normal(size=(RANK, IN))), "B": from_numpy(rng.normal(size=(OUT, RANK)))}
        made.append(Adapter({TARGET: (METHODS["lora"](**factors),)}))
    return made


def _change(adapter: Adapter) -> Array:
    """Return the weight change of an adapter in float64; if its update has factors, compute it from them."""
    import numpy as np

    update: Any = adapter.updates[TARGET][0]
    if update.method == "dense":
        return np.asarray(update.D.numpy())
    made: Array = update.scaling * (update.B.numpy() @ update.A.numpy())
    return made


def measurable() -> Sequence[str]:
    """Return the combiners that need neither data nor a base."""
    return [name for name in COMBINERS if COMBINERS[name].data is None and not COMBINERS[name].based]
