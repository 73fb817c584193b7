"""Updates of a layer's output, and the interface of a layer that they use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

from ...errors import ShapeMismatch
from .update import Update

if TYPE_CHECKING:
    from torch import Tensor

    from .layer import Layer


class OutputUpdate(Update):
    """y' = f(x, layer): a method defines `forward`, or `inside` for a formula before the layer's residual and norm.

    A layer is any module here, with or without a weight. It offers:

    `layer(x)`: its complete output.
    `layer.hidden(x)`: its output before a residual is added and the sum normalised.
    `layer.residual(x)`: the value that is added, or None.
    `layer.norm(h)`: the normalisation of the sum; h itself if there is none.
    `layer.close(h, x, whole)`: the output for another hidden value; without `whole`, neither the residual nor the norm
        is part of it.
    `layer.mix(h, w)`, `layer.per_channel(v)`, `layer.channel`: a 1x1 mix of channels, a vector in the shape that adds
        to the output, and the axis of the channels.
    `layer.weight`, `layer.bias`: the current weight `[out, in, *k]` and bias; a module without a weight has neither.
    `layer.call`: the arguments of the model's own call, by name. The method lists those that it reads in `asks`; a
        missing one is an error. Three hold more than the call does: `input_ids` starts with the tokens of the cache,
        `hidden_states` is the last layer's output without the adapter, and `shadow` is the state of a network beside
        the model, which each block reads by `state` and passes on by `keep`.

    Class attributes:
        placed: True if the formula is `inside`, so that several such updates apply before the layer closes.
        asks: arguments of the model's call that the formula needs.
        hears: arguments of the model's call that the formula uses if they are there.
        moves_input: True if the formula calls the layer with another input than its own.
        of_model: True if the update is at the whole model, `Target("")`, until it has its experts.

    Attributes that place an update, if the method has them:
        residual: path, from the target's parent, of the module whose input is added to the target's output.
        norm: path, likewise, of the module that normalises the sum.
    """

    kind = "output"
    acts_on = "the output of the layer"
    placed: ClassVar[bool] = False
    asks: ClassVar[tuple[str, ...]] = ()
    hears: ClassVar[tuple[str, ...]] = ()
    moves_input: ClassVar[bool] = False
    of_model: ClassVar[bool] = False

    @property
    def lacks_experts(self) -> bool:
        """Whether this is a router without its experts, which computes nothing yet."""
        return False

    @property
    def channels(self) -> int | None:
        """The number of channels that the layer's output must have; None for any."""
        hidden: Any = self.dims().get("hidden")
        return cast(int | None, hidden)

    @property
    def whole(self) -> bool:
        """Whether the layer's residual and norm are part of the result."""
        return True

    def check_against(self, shape: tuple[int, ...]) -> None:
        super().check_against(shape)
        if self.channels not in (None, shape[0]):
            raise ShapeMismatch(f"made for {self.channels} channels; the layer has {shape[0]}", cure=_WRONG_BASE)

    def inside(self, x: Tensor, layer: Layer) -> Tensor:
        """Return the new value of `layer.hidden(x)`."""
        return self.forward(x, layer)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        return layer.close(self.inside(x, layer), x, self.whole)


_WRONG_BASE = "Is this the base that the adapter was trained on?"
