"""Parts of layers as formulas see them: rows of a fused weight, layers before a folded norm, transposed weights."""

from __future__ import annotations

import numpy as np

from .building import Array
from .layers import Layer
from .norms import FoldedNorm
from .sizes import Unsayable
from .values import Value


class Slice:
    """The outputs `start` to `stop` of a layer: the view of an update on rows of a fused weight."""

    def __init__(self, layer: Layer | Normed, rows: tuple[int, int]) -> None:
        self.layer, self.rows = layer, slice(*rows)
        self.x, self.branch = layer.x, layer.branch
        self.mix, self.per_channel, self.channel = layer.mix, layer.per_channel, layer.channel
        self.op, self.direct, self.node = layer.op, layer.direct, layer.node

    def __call__(self, x: Value) -> Value:
        return self.cut(self.layer(x), self.rows)

    def cut(self, y: Value, rows: slice) -> Value:
        """Return some channels of an output."""
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
        """Return the whole output with these channels replaced."""
        from .symbols import SYMBOLS

        out = self.layer.shape[0]
        pieces = [part]
        if self.rows.start:
            pieces.insert(0, self.cut(y, slice(0, self.rows.start)))
        if self.rows.stop < out:
            pieces.append(self.cut(y, slice(self.rows.stop, out)))
        joined: Value = SYMBOLS.concat(pieces, axis=self.channel)
        return joined


class Normed:
    """A layer with a folded batch normalisation, as a formula sees it: the layer before that norm."""

    def __init__(self, layer: Layer, norm: FoldedNorm) -> None:
        self.layer, self.folded = layer, norm
        self.x, self.branch, self.node, self.dtype, self.shape = (
            layer.x,
            layer.branch,
            layer.node,
            layer.dtype,
            layer.shape,
        )
        self.mix, self.per_channel, self.channel = layer.mix, layer.per_channel, layer.channel
        self.op, self.direct = layer.op, layer.direct

    def __call__(self, x: Value) -> Value:
        if x is self.x:
            scale = self.folded.scale
            # A channel that the norm scales to 0 is lost. Any factor will do, since `around` scales it to 0 again.
            back = 1 / np.where(abs(scale) < 1e-30, 1.0, scale)
            return (self.layer(x) - self._vector(self.folded.shift)) * self._vector(back)
        y = self.op(x, self.weight)
        return y if self.bias is None else y + self.per_channel(self.bias)

    def hidden(self, x: Value) -> Value:
        return self(x)

    @property
    def weight(self) -> Value:
        return self._known(self.folded.weight)

    @property
    def bias(self) -> Value | None:
        return None if self.folded.bias is None else self._known(self.folded.bias)

    def around(self, new: Value) -> Value:
        """Return the output after the norm for a new one before it; keeps every bit if the two are equal."""
        return self.layer.y + (new - self(self.x)) * self._vector(self.folded.scale)

    def _vector(self, array: Array) -> Value:
        spread: Value = self.per_channel(self._known(array))
        return spread

    def _known(self, array: Array) -> Value:
        return Value(self.branch, array.shape, self.dtype, None, lambda: array)


class Turned:
    """A layer with the first two axes of its weight swapped, the orientation in which embeddings store weights."""

    def __init__(self, layer: Layer | Normed) -> None:
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
