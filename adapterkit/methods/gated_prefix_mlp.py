"""A prefix of one attention module, computed by an MLP and multiplied by gates that depend on the module's input.

AdapterHub uses this prefix in UniPELT, Mao et al. 2021, https://arxiv.org/abs/2110.07577.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..core.updates import Rule, tensor
from ._bottleneck import gated
from .prefix_mlp import PrefixMLP

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class GatedPrefixMLP(PrefixMLP):
    """Puts keys and values from an MLP before the attention module's own keys and values.

    For each batch row, the MLP's keys and values are multiplied by this row's gates. The MLP has the formula of
    the method `prefix_mlp`, and the gates have the formula of `gated_prefix`.
    """

    place = "prefix"
    acts_on = "the keys and values of the attention"
    paper = "https://arxiv.org/abs/2110.07577"
    rules: ClassVar[tuple[Rule, ...]] = (Rule(require="shares == 1 or shares == 2", where="gate", error="Malformed"),)

    W2: Tensor = tensor("1 2 heads d hidden")
    b2: Tensor = tensor("1 2 heads d")
    gate: Tensor = tensor("shares width")
    gate_bias: Tensor = tensor("shares")

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: Any) -> Self:
        gate = {"gate": random((1, len(W))) / len(W) ** 0.5, "gate_bias": W.new_zeros(1)}
        return super().initial(W, b, rank, random, sizes={**attributes.pop("sizes"), "layers": 1}, **gate, **attributes)

    def past(self) -> None:  # type: ignore[override]
        """Return None, because the prefix is unknown before the forward pass.

        The gates need the attention module's input.
        """

    def prefix(self, x: Tensor) -> Tensor:
        out: Tensor = gated(self.computed(), x, self.gate, self.gate_bias)
        return out
