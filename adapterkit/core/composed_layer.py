"""Chain the updates of one target: a layer with an update is itself a layer, to which the next update is applied.

A layer is a backend's view of one target, with the interface of `torch/layers.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .updates import Additive, OutputUpdate, Update

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from .updates.layer import Layer


class Composed:
    """A layer to which an update has been applied."""

    def __init__(self, layer: Layer, update: Update) -> None:
        self.layer, self.update = layer, update
        self.op, self.mix, self.per_channel = layer.op, layer.mix, layer.per_channel
        self.shape, self.channel = layer.shape, layer.channel

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.update.forward(x, self.layer)
        return y

    def hidden(self, x: Tensor) -> Tensor:
        if not isinstance(self.update, OutputUpdate):
            return self(x)
        inside: Tensor = self.update.inside(x, self.layer)
        return inside

    def zero_padded(self, x: Tensor, w: Tensor) -> Tensor:
        return self.layer.zero_padded(x, w)

    def residual(self, x: Tensor) -> Tensor | None:
        return self.layer.residual(x)

    def norm(self, h: Tensor) -> Tensor:
        return self.layer.norm(h)

    def close(self, h: Tensor, x: Tensor, whole: bool = True) -> Tensor:
        return self.layer.close(h, x, whole)

    @property
    def call(self) -> Mapping[str, Any]:
        return self.layer.call

    @property
    def weight(self) -> Tensor:
        W = self.layer.weight
        return self.update.new_weight(W) if self.update.changes_weight else W

    @property
    def bias(self) -> Tensor | None:
        b = self.layer.bias
        if b is not None:
            settled = self.update.settled(self.layer.weight) if self.update.bias_sees_weight else self.update
            return settled.new_bias(b)
        return self.update.bias_delta() if isinstance(self.update, Additive) else None
