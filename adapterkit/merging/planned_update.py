"""The change that one adapter makes to one stored tensor of a base."""

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
    """The weight that a change of its bias depends on, as it is after all earlier updates.

    Attributes:
        name: the name of the base's weight.
        tensor: the base's weight.
        before: the changes to the weight by earlier targets of the adapter.
        updates: the target's updates in order, both of the weight and of the bias.
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
        updates: the updates to apply, in order.
        weight: the factor on the change.
        source: the adapter's position in the merge.
        bias: whether the stored tensor is the target's bias instead of its weight.
        shape: the stored tensor's shape, with fewer rows if the adapter was trained on its first rows only.
        seen: the weight, if a change of its bias depends on it.
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
        """The axis of the updates, `in` or `out`, that corresponds to the stored tensor's rows."""
        return "in" if self.target.layout.removeprefix("e ").startswith("in") else "out"

    @property
    def logical(self) -> tuple[int, ...]:
        """The shape of one weight in the updates' layout, `[out, in, *k]`."""
        # Treat a bias or a vector as a weight with one input.
        first, second, *rest = self.shape[1:] if self.target.stacked else (*self.shape, 1)[: max(2, len(self.shape))]
        shape = (second, first, *rest) if self.axis == "in" else (first, second, *rest)
        return shape if self.target.rows is None else (self.target.rows[1] - self.target.rows[0], *shape[1:])

    @property
    def blockable(self) -> bool:
        """Whether a block of stored rows can be computed without the other rows."""
        return not self.bias and all(update.cuts(self.axis) for update in self.updates)


def factor_bytes(folds: Sequence[PlannedUpdate]) -> int:
    """Return the memory that the factors of one weight's updates take during its merge."""
    leaves = (leaf for fold in folds for update in fold.updates for leaf in update.tensors.values())
    # Count factors of several adapters twice, because `compute.side_by_side` also holds them joined.
    return sum(math.prod(leaf.shape) for leaf in leaves) * 8 * min(len(folds), 2)
