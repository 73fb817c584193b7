"""What one adapter does to one stored tensor of a base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.updates import Additive, Update

if TYPE_CHECKING:
    from ..core.adapter import Target
    from ..io.lazy import Lazy


@dataclass(frozen=True, slots=True, eq=False)
class PlannedUpdate:
    """What one adapter does to one stored tensor.

    Attributes:
        target: where and in which layout.
        updates: the updates to apply, in order.
        weight: how much of the change is taken.
        source: position of the adapter in the merge.
        bias: the stored tensor is the target's bias, not its weight.
        shape: of the stored tensor; fewer rows where the adapter was trained on its first rows only.
        seen: the base's weight, where the change to its bias needs it.
    """

    target: Target
    updates: tuple[Update, ...]
    weight: float
    source: int
    bias: bool
    shape: tuple[int, ...]
    seen: Lazy | None = None

    @property
    def additive(self) -> bool:
        return all(isinstance(update, Additive) for update in self.updates)

    @property
    def axis(self) -> str:
        """The axis of the update's view that runs along the stored tensor's rows."""
        return "in" if self.target.layout.removeprefix("e ").startswith("in") else "out"

    @property
    def blockable(self) -> bool:
        """Whether a block of stored rows can be computed without the others."""
        return not self.bias and all(update.cuts(self.axis) for update in self.updates)
