"""Composition: a layer after an update is a layer again, which the next update of the same target sees.

A layer is a backend's view of one target, with the interface of `torch/layers.py`.
"""

from __future__ import annotations

from typing import Any

from .updates import Additive, OutputUpdate, Update


class Composed:
    """A layer after an update."""

    def __init__(self, layer: Any, update: Update) -> None:
        self.layer, self.update = layer, update
        self.op, self.mix, self.per_channel = layer.op, layer.mix, layer.per_channel
        self.shape, self.channel = layer.shape, layer.channel

    def __call__(self, x: Any) -> Any:
        return self.update.forward(x, self.layer)

    def hidden(self, x: Any) -> Any:
        return self.update.inside(x, self.layer) if isinstance(self.update, OutputUpdate) else self(x)

    def zero_padded(self, x: Any, w: Any) -> Any:
        return self.layer.zero_padded(x, w)

    def residual(self, x: Any) -> Any:
        return self.layer.residual(x)

    def norm(self, h: Any) -> Any:
        return self.layer.norm(h)

    def close(self, h: Any, x: Any, whole: bool = True) -> Any:
        return self.layer.close(h, x, whole)

    @property
    def call(self) -> Any:
        return self.layer.call

    @property
    def weight(self) -> Any:
        W = self.layer.weight
        return self.update.new_weight(W) if self.update.changes_weight else W

    @property
    def bias(self) -> Any:
        b = self.layer.bias
        if b is not None:
            settled = self.update.settled(self.layer.weight) if self.update.bias_sees_weight else self.update
            return settled.new_bias(b)
        return self.update.bias_delta() if isinstance(self.update, Additive) else None
