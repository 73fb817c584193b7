"""Formulas that replace a part of W by a low-rank product.  No methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ..core.updates import WeightUpdate, tensor
from ..errors import ShapeMismatch

if TYPE_CHECKING:
    from torch import Tensor


class InPlace(WeightUpdate):
    """W' = W - taken(W) + scaling * B @ A; a subclass defines the part that is taken out.

    Class attributes:
        least: number of singular values of W that must remain.
    """

    linear_only = True
    least: ClassVar[int] = 0

    A: Tensor = tensor("r in")
    B: Tensor = tensor("out r")
    scaling: float = 1.0

    def taken(self, W: Tensor) -> Tensor:
        """Return the part of W to take out, of rank r or less."""
        raise AssertionError("each method has its own")

    def left(self) -> Any:
        """Return the left factor of the product with A."""
        return self.B

    def check_against(self, shape: tuple[int, ...]) -> None:
        super().check_against(shape)
        check_rank(int(self.A.shape[-2]), shape, self.least)

    def new_weight(self, W: Tensor) -> Tensor:
        new: Tensor = W - self.taken(W) + (self.scaling * self.left()) @ self.A
        return new


def check_rank(rank: int, shape: tuple[int, ...], least: int = 0) -> None:
    """Check that a weight of `shape` has rank `rank`, and `least` singular values besides.

    Raises:
        ShapeMismatch: it has not.
    """
    if rank > min(shape) - least:
        why = f"rank {rank} of a weight of {list(shape)}, where {min(shape) - least} is the most"
        raise ShapeMismatch(why, cure="The adapter is not of this base")
