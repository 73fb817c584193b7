"""Updates of a layer's output, and the words in which they speak of it."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from ..errors import ShapeMismatch
from .update import Update


class OutputUpdate(Update):
    """y' = f(x, layer): a method defines `forward`, or `inside` where it stands before the layer's residual and norm.

    A layer is any module here, with a weight or without one, in these words:

    `layer(x)`: its output, whole.
    `layer.hidden(x)`: its output before a residual is added and the sum normalised.
    `layer.residual(x)`: what is added, or None.
    `layer.norm(h)`: the normalisation of the sum; h itself where there is none.
    `layer.close(h, x, whole)`: the output for another hidden value; without `whole`, one that neither the residual nor
        the norm is part of.
    `layer.mix(h, w)`, `layer.per_channel(v)`, `layer.channel`: a 1x1 mix of channels, a vector in the shape that adds
        to the output, and the axis of the channels.
    `layer.weight`, `layer.bias`: those that the layer runs with, the weight as `[out, in, *k]`; of a module without a
        weight neither can be asked for.
    `layer.call`: what the model's own call received, by name: the words that the method `asks` for. Asking for one that
        the call lacks is an error. Three are more than the call said: `input_ids` begins with the tokens of a cache
        that the call goes on with, `hidden_states` is what the model's last layer gives without the adapter, and
        `shadow` is the state of a network beside the model, which each block reads by `state` and hands on by `keep`.

    Class attributes:
        placed: the formula is `inside`, so that several such updates follow each other before the layer closes.
        asks: words of the model's call that the formula reads.
        hears: words of the model's call that the formula reads where a call brings them.
        moves_input: the formula calls the layer with another input than its own.
        of_model: it stands at the whole model, `Target("")`, until it has its experts.

    Attributes that place an update, where a method has them:
        residual: path, from the target's parent, of the module whose input is added to the target's output.
        norm: path, likewise, of the module that the sum goes through.
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
        """Whether it is the router of experts that it does not hold, so that it computes nothing yet."""
        return False

    @property
    def channels(self) -> int | None:
        """How many channels the layer's output must have; None where the update does not say."""
        hidden: Any = self.dims().get("hidden")
        return cast(int | None, hidden)

    @property
    def whole(self) -> bool:
        """Whether the layer's residual and norm are part of what comes out."""
        return True

    def check_against(self, shape: tuple[int, ...]) -> None:
        super().check_against(shape)
        if self.channels not in (None, shape[0]):
            raise ShapeMismatch(f"made for {self.channels} channels; the layer has {shape[0]}", cure=_WRONG_BASE)

    def inside(self, x: Any, layer: Any) -> Any:
        """What the update makes of `layer.hidden(x)`."""
        return self.forward(x, layer)

    def forward(self, x: Any, layer: Any) -> Any:
        return layer.close(self.inside(x, layer), x, self.whole)


_WRONG_BASE = "Is this the base that the adapter was trained on?"
