"""Base class of methods that replace a part of W by a low-rank product."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.updates import WeightUpdate, tensor

if TYPE_CHECKING:
    from torch import Tensor


class InPlace(WeightUpdate):
    """W' = W - taken(W) + scaling * B @ A. Subclasses define `taken`, the part of W that is removed."""

    linear_only = True

    A: Tensor = tensor("r in")
    B: Tensor = tensor("out r")
    scaling: float = 1.0

    def taken(self, W: Tensor) -> Tensor:
        """Return the part of W to remove; its rank is at most r."""
        raise AssertionError("each method defines it")

    def left(self) -> Tensor:
        """Return the factor that is multiplied by A from the left: B, or B with a diagonal."""
        return self.B

    def new_weight(self, W: Tensor) -> Tensor:
        new: Tensor = W - self.taken(W) + (self.scaling * self.left()) @ self.A
        return new
