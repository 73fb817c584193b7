"""PVeRA: VeRA that draws B's input at random in training.  Fillioux et al. 2025, https://arxiv.org/abs/2512.07703

For an input x, d * (A @ x) has 2 r elements. The first r are means, and the other r are logarithms of variances. In
training, each of the r inputs of B is drawn from a normal distribution with its own mean and variance. The formula here
uses the means, as PEFT's merge does. PEFT's forward pass at inference also uses the means, unless sampling is enabled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ..core.updates import Rule, tensor
from .vera import VeRA

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class PVeRA(VeRA):
    """W' = W + (b * B[:out]) @ (d[:r] * A[:r, :in]); the weight has two axes."""

    fits: ClassVar[tuple[Rule, ...]] = (
        Rule(require="outs >= out and ins >= in", meaning="the shared matrices are smaller than the weight"),
    )
    paper = "https://arxiv.org/abs/2512.07703"

    d: Tensor = tensor("2*r")
    A: Tensor = tensor("2*r ins")

    @classmethod
    def shared(cls, shapes: Sequence[tuple[int, ...]], rank: int, random: Random) -> dict[str, Tensor]:
        outs, ins = (max(shape[axis] for shape in shapes) for axis in (0, 1))
        return {"A": random((2 * rank, ins)) * (6 / ins) ** 0.5, "B": random((outs, rank)) * (6 / rank) ** 0.5}

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        r = self.B.shape[1]
        return self.b[:, None] * self.B[: shape[0]], self.d[:r, None] * self.A[:r, : shape[1]]
