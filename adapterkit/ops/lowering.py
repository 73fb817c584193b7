"""Convert updates to changes of weights: low-rank factors if the method has them, else a dense array.

All arithmetic on adapters uses these changes, which are float64 numpy arrays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..core.updates import Additive, Update
from ..errors import AdapterkitError, Malformed, ShapeMismatch
from ..io.computed import load
from ..linalg.namespace import summed

if TYPE_CHECKING:
    from os import PathLike

    from ..core.adapter import Target
    from ..io.checkpoint import Checkpoint
    from ..io.computed import Array
    from ..io.lazy import Shape

    Base = Checkpoint | str | PathLike[str]


U = TypeVar("U", bound=Update)


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """A change of one weight: D = B @ A + rest, all float64.

    Attributes:
        B: `[out, r]`. r is 0 without low-rank factors; each update contributes at most the weight's smaller side.
        A: `[r, in * k]`.
        rest: `[out, in * k]`, or None if D = B @ A.
    """

    B: Array
    A: Array
    rest: Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.B), self.A.shape[1]

    @property
    def rank(self) -> int:
        """The inner size r of B @ A."""
        return len(self.A)

    def dense(self) -> Array:
        """Return D `[out, in * k]`. Callers must not modify it, because without factors it is the array `rest`."""
        # Skip the product if its inner size is 0: filling it with zeros took a twentieth of the time of `knots_ties`.
        if self.rest is not None and not self.rank:
            return self.rest
        product: Array = self.B @ self.A
        return product if self.rest is None else product + self.rest

    def scaled(self, weight: float) -> Delta:
        return Delta(weight * self.B, self.A, None if self.rest is None else weight * self.rest)


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """The change that one adapter makes to one target, a weighted sum of additive updates.

    The methods read the tensors when they are called.

    Attributes:
        target: the target.
        shape: the shape of one weight, `[out, in, *k]`.
        updates: the terms of the sum.
        weight: the factor by which the sum is multiplied.
    """

    target: Target
    shape: Shape
    updates: tuple[Additive, ...]
    weight: float = 1.0

    @property
    def changes_weight(self) -> bool:
        return any(update.changes_weight for update in self.updates)

    @property
    def changes_bias(self) -> bool:
        return any(update.changes_bias for update in self.updates)

    @property
    def experts(self) -> int | None:
        """The number of stacked experts; None if the target is not stacked."""
        return int(self.updates[0].dims(True)["e"]) if self.target.stacked else None  # type: ignore[arg-type]

    def deltas(self) -> Iterator[Delta]:
        """Yield the change of the weight, or of each stacked expert in order.

        Raises:
            Malformed: a tensor contains a NaN or an infinity.
        """
        # Read the tensors of a stack once for all experts.
        changing = [loaded(update, self.target) for update in self.updates if update.changes_weight]
        for expert in (None,) if self.experts is None else range(self.experts):
            yield _sum([_delta(part(update, expert), self.shape, self.weight) for update in changing])

    def bias(self) -> Array | None:
        """Return the change of the bias, `[out]` or `[e, out]`; None if the bias does not change."""
        changing = [loaded(update, self.target) for update in self.updates if update.changes_bias]
        terms = [self.weight * self._bias_of(update) for update in changing]
        return summed(terms) if terms else None

    def _bias_of(self, update: Additive) -> Array:
        """Return one update's change of the bias.

        Loop over stacked experts, because formulas accept a single weight.
        """
        import numpy as np

        if self.experts is None:
            change: Any = update.bias_delta()
            return np.asarray(change)
        return np.stack([np.asarray(part(update, expert).bias_delta()) for expert in range(self.experts)])


def loaded(update: U, target: Target) -> U:
    """Return an update with its tensors as float64 numpy arrays.

    Raises:
        Malformed: a tensor contains a NaN or an infinity; the message names target, method and field.
    """
    tensors = {}
    for name, leaf in update.tensors.items():
        try:
            tensors[name] = load(leaf)
        except AdapterkitError as error:
            raise error.at(where=f"{target}: {update.method}.{name}") from None
    return update.replace(**tensors)


def part(update: U, expert: int | None) -> U:
    """Return one expert's update; the update itself if `expert` is None."""
    return update if expert is None else update.expert(expert)


def _delta(update: Additive, shape: Shape, weight: float) -> Delta:
    cure = "The file is damaged, or the adapter does not belong to this base"
    try:
        return _formed(update, shape, weight)
    except IndexError as error:  # The file's positions were not checked before.
        raise Malformed(f"{update.method}: a position is outside the weight ({error})", cure=cure) from None
    except ValueError as error:  # The update does not record its weight's shape.
        raise ShapeMismatch(f"{update.method}: not made for a weight of {list(shape)} ({error})", cure=cure) from None


def _formed(update: Additive, shape: Shape, weight: float) -> Delta:
    import numpy as np

    out, columns = shape[0], math.prod(shape[1:])
    pair = update.pair(shape)
    if pair is not None:
        B, A = (np.asarray(factor) for factor in pair)
        # If the rank exceeds a side of the matrix, factors take more space than the matrix. Use the matrix and an
        # identity as factors.
        if len(A) > min(out, columns):
            D, identity = B @ A, np.eye(min(out, columns))
            B, A = (D, identity) if columns < out else (identity, D)
        return Delta(weight * B, A)
    dense = np.empty(shape)
    update.delta_into(dense, weight)  # type: ignore[arg-type]
    return Delta(np.zeros((out, 0)), np.zeros((0, columns)), dense.reshape(out, columns))


def _sum(deltas: list[Delta]) -> Delta:
    import numpy as np

    if len(deltas) == 1:
        return deltas[0]
    rests = [delta.rest for delta in deltas if delta.rest is not None]
    B, A = np.hstack([delta.B for delta in deltas]), np.vstack([delta.A for delta in deltas])
    return Delta(B, A, summed(rests) if rests else None)
