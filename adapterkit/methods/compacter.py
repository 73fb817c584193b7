"""Compacter: a bottleneck adapter whose two matrices are sums of Kronecker products.

Mahabadi et al. 2021, https://arxiv.org/abs/2106.04647. Both linear layers are parameterised hypercomplex
multiplications (Zhang et al. 2021, https://arxiv.org/abs/2102.08597): `h @ sum_i kron(rule_i, W_i) + bias`. Layers may
share the rules, and may share the other factors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self, cast

from ..core.updates import tensor
from ..linalg.activations import ACTIVATIONS
from ._bottleneck import Narrow, biased

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random
    from ..core.updates.update import Layer


class Compacter(Narrow):
    """change(h) = act(h @ D + down_bias) @ U + up_bias; D and U have the form sum_i kron(rule_i, W_i)."""

    paper = "https://arxiv.org/abs/2106.04647"
    forms = (
        *Narrow.forms,
        (("down_rule",), ("down_rule_left", "down_rule_right")),
        (("down_W",), ("down_left", "down_right")),
        (("up_rule",), ("up_rule_left", "up_rule_right")),
        (("up_W",), ("up_left", "up_right")),
    )

    down_rule: Tensor | None = tensor("n n n", optional=True)
    down_rule_left: Tensor | None = tensor("n n 1", optional=True)
    down_rule_right: Tensor | None = tensor("n 1 n", optional=True)
    down_W: Tensor | None = tensor("n hidden/n d/n", optional=True)
    down_left: Tensor | None = tensor("n hidden/n rank", optional=True)
    down_right: Tensor | None = tensor("n rank d/n", optional=True)
    down_bias: Tensor | None = tensor("d", optional=True)
    up_rule: Tensor | None = tensor("n n n", optional=True)
    up_rule_left: Tensor | None = tensor("n n 1", optional=True)
    up_rule_right: Tensor | None = tensor("n 1 n", optional=True)
    up_W: Tensor | None = tensor("n d/n hidden/n", optional=True)
    up_left: Tensor | None = tensor("n d/n rank", optional=True)
    up_right: Tensor | None = tensor("n rank hidden/n", optional=True)
    up_bias: Tensor | None = tensor("hidden", optional=True)

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        hidden, n = len(W), next(n for n in (4, 3, 2, 1) if not len(W) % n and not rank % n)
        rule, left = random((n, n, n)), random((n, hidden // n, 1)) / (hidden // n) ** 0.5
        right, up_left = random((n, 1, rank // n)), random((n, rank // n, 1)) / (rank // n) ** 0.5
        return cls.from_fields(
            down_rule=rule, down_left=left, down_right=right, down_bias=W.new_zeros(rank), up_rule=rule,
            up_left=up_left, up_right=W.new_zeros(n, 1, hidden // n), up_bias=W.new_zeros(hidden), **attributes,
        )  # fmt: skip

    def change(self, h: Tensor, layer: Layer) -> Tensor:
        down, up = self._matrix("down"), self._matrix("up")
        inner = ACTIVATIONS[self.non_linearity](biased(layer.mix(h, down), self.down_bias, layer))
        return biased(layer.mix(inner, up), self.up_bias, layer)

    def _matrix(self, side: str) -> Tensor:
        """Return sum_i kron(rule_i, W_i) as the `[out, in]` matrix of a linear layer."""
        rule, W = self._factor(f"{side}_rule", f"{side}_rule"), self._factor(f"{side}_W", side)
        a, b = rule.shape[1] * W.shape[1], rule.shape[2] * W.shape[2]
        return (rule[:, :, None, :, None] * W[:, None, :, None, :]).sum(0).reshape(a, b).mT

    def _factor(self, whole: str, halves: str) -> Tensor:
        tensors = cast("dict[str, Tensor]", self.tensors)
        return tensors[whole] if whole in tensors else tensors[f"{halves}_left"] @ tensors[f"{halves}_right"]
