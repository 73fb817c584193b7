"""Invertible adapters: y1' = y1 + F(y2), y2' = y2 + G(y1').  Pfeiffer et al. 2020, https://arxiv.org/abs/2005.00052

An additive coupling block (NICE, Dinh et al. 2014, https://arxiv.org/abs/1410.8516) behind the embeddings, and its
inverse before the output head: there the target is the head, and `reverse` is set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from ..errors import ShapeMismatch
from ..tensors.activations import ACTIVATIONS
from ..tensors.namespace import namespace
from ..updates import OutputUpdate, attribute, tensor

if TYPE_CHECKING:
    from torch import Tensor

    from ..updates import Random


class Invertible(OutputUpdate):
    """f on the output, or the inverse of f on the input; F and G are linear layers around an activation."""

    paper = "https://arxiv.org/abs/2005.00052"

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
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: Any) -> Self:
        size = W.shape[1] if attributes.get("reverse") else len(W)
        first, second = size // 2, size - size // 2
        return cls(
            F_down=random((rank, second)) / second**0.5, F_down_bias=W.new_zeros(rank), F_up=W.new_zeros(first, rank),
            F_up_bias=W.new_zeros(first), G_down=random((rank, first)) / max(first, 1) ** 0.5,
            G_down_bias=W.new_zeros(rank), G_up=W.new_zeros(second, rank), G_up_bias=W.new_zeros(second), **attributes,
        )  # fmt: skip

    @property
    def channels(self) -> int | None:
        return None if self.reverse else self._size

    @property
    def _size(self) -> int:
        return int(self.F_up_bias.shape[0] + self.G_up_bias.shape[0])

    def check_against(self, shape: tuple[int, ...]) -> None:
        super().check_against(shape)
        if len(shape) > 2 or (self.reverse and shape[1:] != (self._size,)):
            why = f"made for {self._size} channels in the last axis; the layer's weight is {list(shape)}"
            raise ShapeMismatch(why, cure="Is this the base that the adapter was trained on?")

    def forward(self, x: Any, layer: Any) -> Any:
        return layer(self._backward(x)) if self.reverse else self._forward(layer(x))

    def _forward(self, y: Any) -> Any:
        y1, y2 = self._halves(y)
        y1 = y1 + self._first(y2)
        return namespace(y).concat([y1, y2 + self._second(y1)], axis=-1)

    def _backward(self, y: Any) -> Any:
        y1, y2 = self._halves(y)
        y2 = y2 - self._second(y1)
        return namespace(y).concat([y1 - self._first(y2), y2], axis=-1)

    def _halves(self, y: Any) -> tuple[Any, Any]:
        first = self.F_up_bias.shape[0]
        return y[..., :first], y[..., first:]

    def _first(self, h: Any) -> Any:
        inner = ACTIVATIONS[self.non_linearity](h @ self.F_down.mT + self.F_down_bias)
        return inner @ self.F_up.mT + self.F_up_bias

    def _second(self, h: Any) -> Any:
        inner = ACTIVATIONS[self.non_linearity](h @ self.G_down.mT + self.G_down_bias)
        return inner @ self.G_up.mT + self.G_up_bias
