"""A prefix of one attention module, multiplied by gates that depend on the module's input.

Mao et al. 2021, https://arxiv.org/abs/2110.07577

AdapterHub uses this prefix in UniPELT. P was either trained directly, or computed by a trained network that is not
stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..core.updates import ContextUpdate, Rule, tensor
from ._bottleneck import gated

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class GatedPrefix(ContextUpdate):
    """Puts keys P[0, 0] and values P[0, 1] before the attention module's own keys and values.

    For each batch row, P is multiplied by this row's gates.
    """

    place = "prefix"
    acts_on = "the keys and values of the attention"
    paper = "https://arxiv.org/abs/2110.07577"
    rules: ClassVar[tuple[Rule, ...]] = (Rule(require="shares == 1 or shares == 2", where="gate", error="Malformed"),)

    P: Tensor = tensor("1 2 heads n d")
    gate: Tensor = tensor("shares width")
    gate_bias: Tensor = tensor("shares")

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: Any) -> Self:
        sizes, width = attributes.pop("sizes"), len(W)
        P, gate = random((1, 2, sizes["heads"], rank, sizes["d"])), random((1, width)) / width**0.5
        return cls.from_fields(P=P, gate=gate, gate_bias=W.new_zeros(1), **attributes)

    def prefix(self, x: Tensor) -> Tensor:
        out: Tensor = gated(self.P, x, self.gate, self.gate_bias)
        return out
