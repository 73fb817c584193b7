"""Prefix tuning: trained keys and values before the keys and values of the input.

Li and Liang 2021, https://arxiv.org/abs/2101.00190

The formula also covers Cartridges (Eyuboglu et al. 2025, https://arxiv.org/abs/2506.06266). If a network computes the
prefix, the formula applies to files that store the network's output, as PEFT's files do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from ..core.updates import ContextUpdate, attribute, tensor

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class Prefix(ContextUpdate):
    """Puts keys P[j, 0] and values P[j, 1] before the keys and values of layer i; j is (i * step) mod layers."""

    place = "past"
    paper = "https://arxiv.org/abs/2101.00190"

    P: Tensor = tensor("layers 2 heads n d")
    step: int = attribute(1, least=1)

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: Any) -> Self:
        sizes = attributes.pop("sizes")
        P = random((sizes["layers"], 2, sizes["heads"], rank, sizes["d"]))
        return cls.from_fields(P=P, **attributes)

    def past(self) -> Tensor:
        layers = self.P.shape[0]
        return self.P if self.step == 1 else self.P[[layer * self.step % layers for layer in range(layers)]]
