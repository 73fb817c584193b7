"""Draw positions that files omit, from a seed and in the same way as PEFT."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from ....errors import Malformed, ShapeMismatch
from ....io.lazy import DTYPES, Lazy

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.strict_json import JsonValue
    from ..file import Key


LARGEST = 1 << 34
"""The limit on the elements of a weight, against hostile files."""


def drawn(seed: int | None, out: int, in_: int, count: int, key: Key) -> Lazy:
    """Return rows and columns of the first `count` positions in random order, `[2, count]`; drawn when they are read.

    Raises:
        Malformed: there is no valid seed.
        ShapeMismatch: the weight has too few elements.
    """
    if seed is None or not -(1 << 63) <= seed < 1 << 64:
        raise Malformed(
            f"{seed} is not a seed for torch", where="random_loc_seed", cure="Save the adapter again with PEFT"
        )
    if not count <= out * in_ <= LARGEST:
        why = f"the file has {count} coefficients for a weight with {out * in_} elements"
        raise ShapeMismatch(why, where=key.text, cure="Is this the base that the adapter was trained on?")
    return _drawn(seed, out, in_, count)


@lru_cache(maxsize=64)
def _drawn(seed: int, out: int, in_: int, count: int) -> Lazy:
    """Return one tensor for all weights of a size, because drawing it shuffles as many numbers as a weight has."""

    @cache
    def fetch() -> bytes:
        import numpy as np

        from ....linalg.positions import random_positions

        flat = random_positions(seed, out * in_, count).numpy()
        return np.stack(np.divmod(flat, in_)).astype("<i8").tobytes()

    return Lazy((2, count), DTYPES["I64"], fetch)


def of_one(updates: Mapping[Target, tuple[Update, ...]], method: type[Update]) -> dict[str, JsonValue]:
    """Return the fields `scaling` and `fan_in_fan_out`, which a config states once for all modules."""
    own: list[Any] = [(target, u) for target, found in updates.items() for u in found if type(u) is method]
    scaling = Counter(float(update.scaling) for _, update in own).most_common(1)[0][0]
    return {"scaling": scaling, "fan_in_fan_out": any(target.layout == "in out *k" for target, _ in own)}
