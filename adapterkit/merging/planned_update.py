"""Describe the change that one adapter makes to one stored tensor of a base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.updates import Additive, Update

if TYPE_CHECKING:
    from ..core.adapter import Target
    from ..io.lazy import Lazy


@dataclass(frozen=True, slots=True, eq=False)
class SeenWeight:
    """A target's weight and updates. They are needed if the change of the target's bias depends on the weight.

    Attributes:
        name: the name of the base's weight.
        tensor: the base's weight.
        before: the planned updates of the same adapter that change the weight before this target's updates do.
        updates: all updates of the target's weight and bias, in order.
    """

    name: str
    tensor: Lazy
    before: tuple[PlannedUpdate, ...]
    updates: tuple[Update, ...]


@dataclass(frozen=True, slots=True, eq=False)
class PlannedUpdate:
    """The change that one adapter makes to one stored tensor.

    Attributes:
        target: the target, with its layout and rows.
        updates: the target's updates that change this tensor, in order.
        weight: the factor by which the change is multiplied.
        source: the adapter's position in the merge's list of adapters; -1 if the change comes from no adapter.
        bias: whether the stored tensor is the target's bias instead of its weight.
        shape: the shape of the stored tensor when the adapter was trained. The base's tensor has a different number of
            rows if the adapter was trained with a different number of tokens.
        seen: the target's weight and updates, if the stored tensor is a bias and its change depends on the weight; else
            None.
    """

    target: Target
    updates: tuple[Update, ...]
    weight: float
    source: int
    bias: bool
    shape: tuple[int, ...]
    seen: SeenWeight | None = None

    @property
    def additive(self) -> bool:
        return all(isinstance(update, Additive) for update in self.updates)

    @property
    def axis(self) -> str:
        """`out` if the tensor is stored as `[out, in, *k]`, `in` if it is stored as `[in, out, *k]`.

        If the tensor has an axis of experts, it comes before these axes.
        """
        return "in" if self.target.layout.removeprefix("e ").startswith("in") else "out"

    @property
    def logical(self) -> tuple[int, ...]:
        """The shape that the updates expect, `[out, in, *k]`. It has only the target's rows, and no axis of experts."""
        # Treat a bias or a vector as a weight with one input.
        first, second, *rest = self.shape[1:] if self.target.stacked else (*self.shape, 1)[: max(2, len(self.shape))]
        shape = (second, first, *rest) if self.axis == "in" else (first, second, *rest)
        return shape if self.target.rows is None else (self.target.rows[1] - self.target.rows[0], *shape[1:])

    @property
    def blockable(self) -> bool:
        """Whether a block of stored rows can be computed without the other rows."""
        return not self.bias and all(update.cuts(self.axis) for update in self.updates)


def factor_bytes(folds: Sequence[PlannedUpdate]) -> int:
    """Return the memory in bytes that the factors of a weight's updates need while the weight is merged."""
    leaves = (leaf for fold in folds for update in fold.updates for leaf in update.tensors.values())
    # Count the factors of several adapters twice, because `compute.side_by_side` also stores the joined factors.
    return sum(math.prod(leaf.shape) for leaf in leaves) * 8 * min(len(folds), 2)
