"""Methods that replace a part of W by a low-rank product.  Base classes only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.updates import WeightUpdate, tensor

if TYPE_CHECKING:
    from torch import Tensor


class InPlace(WeightUpdate):
    """W' = W - taken(W) + scaling * B @ A; a subclass defines `taken`, the part to remove."""

    linear_only = True

    A: Tensor = tensor("r in")
    B: Tensor = tensor("out r")
    scaling: float = 1.0

    def taken(self, W: Tensor) -> Tensor:
        """Return the part of W to remove; its rank is at most r."""
        raise AssertionError("each method defines it")

    def left(self) -> Tensor:
        """Return the left factor, which multiplies A."""
        return self.B

    def new_weight(self, W: Tensor) -> Tensor:
        new: Tensor = W - self.taken(W) + (self.scaling * self.left()) @ self.A
        return new
