"""The context of a formula: the weight and target that it computes, its random numbers, and shared counts."""

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
"""32-bit words that Philox4x64 makes from one value of its counter."""


def _no_base() -> Array:
    raise UsageError("the formula needs the base's weights", where="base", cure="Pass base=/--base")


@dataclass(frozen=True, slots=True, eq=False)
class FormulaContext:
    """One weight, or one bias, of one target.

    Attributes:
        target: the target.
        shape: the shape of the weight, `[out, in, *k]`.
        present: positions of the adapters that have a change here, in the list of all adapters.
        part: the part of the target: `weight`, `bias`, or `weight 3` for one of stacked experts.
        seed: the seed of all random numbers.
        overrides: parameters of single adapters, by position in the list of all adapters.
        scalings: the scaling of each present adapter, if it has a single pair of factors; else None.
        census: counts over all targets, finished or being made.
        asks: the argument `data=`, for methods that need it.
        depth: from 0 in the first layer to 1 in the last; None for targets outside numbered layers.
        learned: the coefficients of this target, for methods that learn them.
        base: returns the base's weight `[out, in * k]` or bias `[out]` here.
    """

    target: Target
    shape: Shape
    present: tuple[int, ...]
    part: str = "weight"
    seed: int = 0
    overrides: Sequence[Mapping[str, Any]] = ()
    scalings: tuple[float | None, ...] = ()
    census: Census = field(default_factory=Census)
    asks: Callable[..., object] | None = None
    depth: float | None = None
    learned: Array | None = None
    base: Callable[[], Array] = _no_base

    def each(self, method: Combiner, name: str) -> list[Any]:
        """Return the values of a parameter, one per present adapter."""
        own = [self.overrides[t] if self.overrides else {} for t in self.present]
        return [values.get(name, getattr(method, name)) for values in own]

    def uniform(self, t: int, shape: tuple[int, ...], first: int = 0) -> Array:
        """Draw numbers in [0, 1) for present adapter t; they depend only on seed, target, part and position.

        Number n of an adapter is 32-bit word n of Philox4x64-10, low words first, divided by 2^32; the key is a hash.

        Args:
            t: the index of the adapter in `present`.
            shape: the shape of the result.
            first: the index of the first number in the adapter's stream.
        """
        import math

        import numpy as np

        count, begin = math.prod(shape), first // PER_COUNT
        skipped = first - begin * PER_COUNT
        # A counter-based stream can start anywhere, which blocks need. numpy's takes 2 ns for each number, a tenth of
        # the time of Philox written with arrays of integers.
        stream = np.random.Philox(key=self.key(t), counter=begin)
        drawn = stream.random_raw((skipped + count + 1) // 2).astype("<u8", copy=False).view("<u4")
        return (drawn[skipped : skipped + count] * 2.0**-32).reshape(shape)

    def key(self, t: int) -> int:
        """Return the key of the random numbers of present adapter t, 64 bits."""
        words = f"{self.seed}\n{self.target}\n{self.part}\n{self.present[t]}"
        return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "little")
