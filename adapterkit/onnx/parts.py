"""Parts of layers: rows of a fused weight, and weights seen the other way round; layers themselves, to a formula."""

from __future__ import annotations

from .layers import Layer
from .sizes import Unsayable
from .values import Value


class Slice:
    """The outputs `start` to `stop` of a layer: what an update of a fused weight's rows sees."""

    def __init__(self, layer: Layer, rows: tuple[int, int]) -> None:
        self.layer, self.rows = layer, slice(*rows)
        self.x, self.branch = layer.x, layer.branch
        self.mix, self.per_channel, self.channel = layer.mix, layer.per_channel, layer.channel
        self.op, self.direct, self.node = layer.op, layer.direct, layer.node

    def __call__(self, x: Value) -> Value:
        return self.cut(self.layer(x), self.rows)

    def cut(self, y: Value, rows: slice) -> Value:
        """Some channels of an output."""
        return y[(..., rows, *[slice(None)] * (-self.channel - 1))]

    @property
    def weight(self) -> Value:
        return self.layer.weight[self.rows]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def bias(self) -> Value | None:
        b = self.layer.bias
        return None if b is None else b[self.rows]

    def around(self, y: Value, part: Value) -> Value:
        """The whole output, with these channels exchanged."""
        from .symbols import SYMBOLS

        out = self.layer.shape[0]
        pieces = [part]
        if self.rows.start:
            pieces.insert(0, self.cut(y, slice(0, self.rows.start)))
        if self.rows.stop < out:
            pieces.append(self.cut(y, slice(self.rows.stop, out)))
        joined: Value = SYMBOLS.concat(pieces, axis=self.channel)
        return joined


class Turned:
    """A layer seen with its first two axes exchanged, as whole weights of embeddings are stored."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.x, self.branch, self.node = layer, layer.x, layer.branch, layer.node
        self.channel, self.direct, self.per_channel, self.bias = layer.channel, False, layer.per_channel, layer.bias

    def __call__(self, x: Value) -> Value:
        return self.layer(x)

    @property
    def weight(self) -> Value:
        return self.layer.weight.swapaxes(0, 1)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def op(self, x: Value, w: Value) -> Value:
        return self.layer.op(x, w.swapaxes(0, 1))

    def mix(self, h: Value, w: Value) -> Value:
        raise Unsayable("a mix of channels behind a turned weight")
