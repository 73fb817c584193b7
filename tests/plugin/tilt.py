"""Tilt: W' = W + by u v^T, an example of a method in a package of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from adapterkit.core.updates import WeightUpdate, tensor

if TYPE_CHECKING:
    from torch import Tensor

    from adapterkit.core.updates import Random


class Tilt(WeightUpdate):
    """A weight is tilted along one direction of its outputs and one of its inputs."""

    paper = "https://example.org/tilt"

    u: Tensor = tensor("out")
    v: Tensor = tensor("in")
    by: float = 1.0

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        """The outputs' direction is zero, so that a fresh update changes nothing."""
        return cls.from_fields(u=W.new_zeros(len(W)), v=random((W.shape[1],)), **attributes)

    def new_weight(self, W: Tensor) -> Tensor:
        """The formula."""
        return W + self.by * self.u[:, None] * self.v[None]
