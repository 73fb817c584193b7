"""Residual: subtract the initial value of a LoRA from the base.  Meng et al. 2024, https://arxiv.org/abs/2404.02948

W' = W - scaling * B @ A, or W' = W - scaling * D. PiSSA, OLoRA and CorDA subtract the initial value of B @ A from the
base. LoftQ subtracts the base's rounding error. The training tools of these methods overwrite the base. In adapterkit,
the subtraction is an update that is not trained. So the base stays unchanged, and the adapter contains the whole
change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

from ..core.updates import Additive, of_pair, tensor

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates.update import Layer


class Residual(Additive):
    """W' = W - scaling * B @ A, or W - scaling * D."""

    blocks = frozenset({"out", "in"})
    frozen: ClassVar[frozenset[str]] = frozenset({"A", "B", "D"})
    forms = ((("A", "B"), ("D",)),)
    paper = "https://arxiv.org/abs/2404.02948"
    since: ClassVar[tuple[str, ...]] = ("1.1",)

    A: Tensor | None = tensor("r in *k", optional=True)
    B: Tensor | None = tensor("out r", optional=True)
    D: Tensor | None = tensor("out in *k", optional=True)
    scaling: float = 1.0

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        pair = self.pair(shape)
        D = -self.scaling * cast("Tensor", self.D) if pair is None else pair[0] @ pair[1]
        return D.reshape(shape)

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
        if self.A is None or self.B is None:
            return None
        return -self.scaling * self.B, self.A.reshape(len(self.A), -1)

    @of_pair
    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        if self.A is None or self.B is None:
            return super().forward(x, layer)
        return layer(x) - layer.mix(layer.op(x, self.A), self.B) * self.scaling
