"""Invertible adapters: y1' = y1 + F(y2), y2' = y2 + G(y1').  Pfeiffer et al. 2020, https://arxiv.org/abs/2005.00052

The adapter is an additive coupling block (NICE, Dinh et al. 2014, https://arxiv.org/abs/1410.8516) after the
embeddings. y1 are the first channels of the embeddings, and y2 the others. The block's inverse is applied to the input
of the output head. The inverse is a separate update: its target is the head, and `reverse` is true.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from ..core.updates import OutputUpdate, Rule, attribute, tensor
from ..linalg.activations import ACTIVATIONS
from ..linalg.namespace import namespace

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random
    from ..core.updates.update import Layer


class Invertible(OutputUpdate):
    """Applies the coupling block to the target's output.

    If `reverse` is true, the update instead applies the block's inverse to the target's input. F and G each consist of
    two linear layers with an activation between them.
    """

    paper = "https://arxiv.org/abs/2005.00052"
    fits: ClassVar[tuple[Rule, ...]] = (
        Rule(require="kernel == 0", meaning="the target is a convolution, whose channels are not the last axis"),
        Rule(
            when="not reverse",
            require="first + second == out",
            meaning="the adapter was made for another number of channels",
        ),
        Rule(
            when="reverse", require="first + second == in", meaning="the adapter was made for another number of inputs"
        ),
    )

    F_down: Tensor = tensor("a second")
    F_down_bias: Tensor = tensor("a")
    F_up: Tensor = tensor("first a")
    F_up_bias: Tensor = tensor("first")
    G_down: Tensor = tensor("b first")
    G_down_bias: Tensor = tensor("b")
    G_up: Tensor = tensor("second b")
    G_up_bias: Tensor = tensor("second")
    non_linearity: str = attribute("relu", among=ACTIVATIONS)
    reverse: bool = False

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        size = W.shape[1] if attributes.get("reverse") else len(W)
        first, second = size // 2, size - size // 2
        shapes: dict[str, Any] = {"F_down_bias": rank, "F_up": (first, rank), "F_up_bias": first, "G_down_bias": rank}
        shapes |= {"G_up": (second, rank), "G_up_bias": second}
        zeros: dict[str, Any] = {name: W.new_zeros(shape) for name, shape in shapes.items()}
        F, G = random((rank, second)) / second**0.5, random((rank, first)) / max(first, 1) ** 0.5
        return cls.from_fields(F_down=F, G_down=G, **zeros, **attributes)

    @property
    def channels(self) -> int | None:
        return None if self.reverse else self._size

    @property
    def _size(self) -> int:
        return int(self.F_up_bias.shape[0] + self.G_up_bias.shape[0])

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        return layer(self._backward(x)) if self.reverse else self._forward(layer(x))

    def _forward(self, y: Tensor) -> Tensor:
        y1, y2 = self._halves(y)
        y1 = y1 + self._net("F", y2)
        return namespace(y).concat([y1, y2 + self._net("G", y1)], axis=-1)

    def _backward(self, y: Tensor) -> Tensor:
        y1, y2 = self._halves(y)
        y2 = y2 - self._net("G", y1)
        return namespace(y).concat([y1 - self._net("F", y2), y2], axis=-1)

    def _halves(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y[..., : len(self.F_up_bias)], y[..., len(self.F_up_bias) :]

    def _net(self, half: str, h: Tensor) -> Tensor:
        tensors = cast("dict[str, Tensor]", self.tensors)
        inner = ACTIVATIONS[self.non_linearity](h @ tensors[f"{half}_down"].mT + tensors[f"{half}_down_bias"])
        return inner @ tensors[f"{half}_up"].mT + tensors[f"{half}_up_bias"]
