"""Where a formula runs: which weight of which target, what is drawn at random there, and what is computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .census import Census

if TYPE_CHECKING:
    from ..core.adapter import Target
    from ..io.computed import Array
    from ..io.lazy import Shape
    from .combiners._combiner import Combiner


PER_COUNT = 8
"""Words of 32 bits that Philox4x64 makes of one value of its counter."""


def _no_base() -> Array:
    raise UsageError("a law of the base's weights", where="base", cure="Pass base=/--base")


@dataclass(frozen=True, slots=True, eq=False)
class FormulaContext:
    """One weight, or one bias, of one target.

    Attributes:
        target: where.
        shape: of the weight, `[out, in, *k]`.
        present: which of the adapters have a change there, as positions in the list that was given.
        part: what of the target: `weight`, `bias`, or `weight 3` for an expert of a stack.
        seed: of everything that is random.
        overrides: parameters of single adapters, by position in the list that was given.
        scalings: the factor apart from B and A of each present adapter, where it has a single pair of factors.
        census: what was counted over all targets, or is being counted.
        asks: `data=`, for methods that need it.
        depth: from 0 in the first layer to 1 in the last; None for targets in no numbered layer.
        base: gives what the base has here, `[out, in * k]` or `[out]`, to methods that look at it.
    """

    target: Target
    shape: Shape
    present: tuple[int, ...]
    part: str = "weight"
    seed: int = 0
    overrides: Sequence[Mapping[str, Any]] = ()
    scalings: tuple[float | None, ...] = ()
    census: Census = field(default_factory=Census)
    asks: Callable[..., Any] | None = None
    depth: float | None = None
    base: Callable[[], Array] = _no_base

    def each(self, method: Combiner, name: str) -> list[Any]:
        """A parameter, one value for each present adapter."""
        own = [self.overrides[t] if self.overrides else {} for t in self.present]
        return [values.get(name, getattr(method, name)) for values in own]

    def uniform(self, t: int, shape: tuple[int, ...], first: int = 0) -> Array:
        """Numbers in [0, 1) for present adapter t: a function of seed, target, part and its position alone.

        Number n of an adapter is word n of Philox4x64-10 in words of 32 bits, low words first, divided by 2^32; the key
        is a hash. numpy's is the fastest stream that any part can be had of: 2 ns a number, a tenth of what arrays of
        integers take.

        Args:
            t: which adapter.
            shape: of the result.
            first: the place of its first number in the adapter's stream.
        """
        import math

        import numpy as np

        words = f"{self.seed}\n{self.target}\n{self.part}\n{self.present[t]}"
        key = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "little")
        count, begin = math.prod(shape), first // PER_COUNT
        skipped = first - begin * PER_COUNT
        stream = np.random.Philox(key=key, counter=begin)
        drawn = stream.random_raw((skipped + count + 1) // 2).astype("<u8", copy=False).view("<u4")
        return (drawn[skipped : skipped + count] * 2.0**-32).reshape(shape)
