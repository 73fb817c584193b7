"""Bottleneck adapters: h' = h + scaling * up(act(down(h))).  Houlsby et al. 2019, https://arxiv.org/abs/1902.00751

The class also covers the adapters of Pfeiffer et al. 2020, https://arxiv.org/abs/2005.00247, parallel adapters (He et
al. 2021, https://arxiv.org/abs/2110.04366), gated adapters (Mao et al. 2021, https://arxiv.org/abs/2110.07577) and
Adapter+ (Steitz and Roth 2024, https://arxiv.org/abs/2406.06820). Each of them is this class with different values of
its fields.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from ..core.updates import tensor
from ..linalg.activations import ACTIVATIONS
from ._bottleneck import Narrow, biased

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random
    from ..core.updates.update import Layer


class Bottleneck(Narrow):
    """change(h) = up @ act(down @ h + down_bias) + up_bias."""

    paper = "https://arxiv.org/abs/1902.00751"

    down: Tensor = tensor("d hidden")
    down_bias: Tensor | None = tensor("d", optional=True)
    up: Tensor = tensor("hidden d")
    up_bias: Tensor | None = tensor("hidden", optional=True)

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        hidden = len(W)
        down, zeros = random((rank, hidden)) / hidden**0.5, W.new_zeros(hidden)
        return cls.from_fields(
            down=down, down_bias=zeros[:1].repeat(rank), up=W.new_zeros(hidden, rank), up_bias=zeros, **attributes
        )

    def change(self, h: Tensor, layer: Layer) -> Tensor:
        inner = ACTIVATIONS[self.non_linearity](biased(layer.mix(h, self.down), self.down_bias, layer))
        return biased(layer.mix(inner, self.up), self.up_bias, layer)
