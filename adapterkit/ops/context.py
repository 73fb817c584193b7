"""The context in which a combiner's formula runs: the target, random numbers, and statistics over all targets."""

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
"""The number of 32-bit words that Philox4x64 generates from one counter value."""


def _no_base() -> Array:
    raise UsageError("the formula needs the base's weights", where="base", cure="Pass base=/--base")


@dataclass(frozen=True, slots=True, eq=False)
class FormulaContext:
    """The context of a formula for one weight or one bias.

    Attributes:
        target: the target.
        shape: the shape of the weight, `[out, in, *k]`.
        present: indices of the adapters that change this weight or bias, in the list of all adapters.
        part: the part of the target: `weight` or `bias`, for a stacked expert with its number, such as `weight 3`.
        seed: the seed of all random numbers.
        overrides: parameters that apply to one adapter only, by index in the list of all adapters.
        scalings: the scaling of each present adapter, if it has a single update with a scaling; otherwise None.
        census: statistics over all targets, complete or being collected.
        asks: the function `data`, for methods that need it.
        depth: the depth of the target, 0 in the first layer and 1 in the last; None outside numbered layers.
        learned: the learned coefficients of this target, for methods that learn coefficients.
        base: a function that returns the base's weight `[out, in * k]` or bias `[out]`.
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
        """Return the value of a parameter for each present adapter."""
        own = [self.overrides[t] if self.overrides else {} for t in self.present]
        return [values.get(name, getattr(method, name)) for values in own]

    def uniform(self, t: int, shape: tuple[int, ...], first: int = 0) -> Array:
        """Draw numbers in [0, 1) for present adapter t; they depend only on seed, target, part and index.

        An adapter's number n is the 32-bit word n of Philox4x64-10 (low words first), divided by 2^32; see `key` for
        the key.

        Args:
            t: the index of the adapter in `present`.
            shape: the shape of the result.
            first: the index n of the first number to return.
        """
        import math

        import numpy as np

        count, begin = math.prod(shape), first // PER_COUNT
        skipped = first - begin * PER_COUNT
        # Use a counter-based generator, which can start at any index, because blocks start anywhere. numpy's Philox
        # takes 2 ns per number, a tenth of the time of Philox written with numpy's integer arrays.
        stream = np.random.Philox(key=self.key(t), counter=begin)
        drawn = stream.random_raw((skipped + count + 1) // 2).astype("<u8", copy=False).view("<u4")
        return (drawn[skipped : skipped + count] * 2.0**-32).reshape(shape)

    def key(self, t: int) -> int:
        """Return the 64-bit key of Philox for present adapter t, a hash of seed, target, part and index."""
        words = f"{self.seed}\n{self.target}\n{self.part}\n{self.present[t]}"
        return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "little")
