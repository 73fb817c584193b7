"""The four kinds of update: additive updates, functions of the weight, functions of a layer's output, and context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar, cast

from ...errors import NotMergeable, ShapeMismatch
from .update import Update

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .layer import Layer

    Task = int | torch.Tensor | None
    """One task number, or the numbers of a batch's rows; None for prompts without tasks."""

_Function = TypeVar("_Function")


def of_pair(forward: _Function) -> _Function:
    """Mark a `forward` that computes layer(x) + mix(op(x, A), B) + d; A, B are from `pair`, d from `bias_delta`.

    Backends may then compute the pair by a faster path. A method that overrides `forward` loses the mark, so backends
    never replace a formula that depends on the tokens by a plain pair.
    """
    forward.of_pair = True  # type: ignore[attr-defined]
    return forward


class Additive(Update):
    """W' = W + D, b' = b + d, where D and d do not depend on W.

    Class attributes:
        thin: True if `forward` equals the low-rank path of `pair`; see `of_pair`.
    """

    kind = "additive"
    thin: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.thin = getattr(cls.forward, "of_pair", False)

    @property
    def changes_weight(self) -> bool:
        return True

    def delta(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return D for a weight of `shape` = `[out, in, *k]`."""
        raise NotMergeable(f"{self.method} has no formula")

    def bias_delta(self) -> torch.Tensor | None:
        """Return d `[out]`, or None if the bias does not change."""
        return None

    def pair(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return B `[out, r]` and A `[r, in * k]` with D = B @ A if the formula is such a product, else None."""
        return None

    def factors(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """Return B, A and s with D = s * B @ A, like `pair`; methods override this to keep the scaling out of B."""
        pair = self.pair(shape)
        return None if pair is None else (*pair, 1.0)

    def scaled(self, weight: float) -> Self | None:
        """Return an update of the same method with weight * D and weight * d; None if it would read leaves."""
        scaling = self.attributes.get("scaling")
        return None if scaling is None else self.replace(scaling=weight * scaling)

    def delta_norm(self, shape: tuple[int, ...]) -> float:
        """Return the Frobenius norm of D; methods override this function if they need not form D."""
        D = self.delta(shape)
        return math.sqrt(float((D * D).sum()))

    def delta_into(self, D: torch.Tensor, weight: float) -> None:
        """Write weight * D into an array of the weight's shape; methods override this function to avoid a copy."""
        D[...] = weight * self.delta(tuple(D.shape))

    def new_weight(self, W: torch.Tensor) -> torch.Tensor:
        return W + self.delta(tuple(W.shape))

    def new_bias(self, b: torch.Tensor) -> torch.Tensor:
        d = self.bias_delta()
        return b if d is None else b + d

    @of_pair
    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        d = self.bias_delta()
        y = layer(x) + layer.op(x, self.delta(layer.shape)) if self.changes_weight else layer(x)
        return y if d is None else y + layer.per_channel(d)


class WeightUpdate(Update):
    """W' = f(W), b' = g(b)."""

    kind = "weight"

    @property
    def changes_weight(self) -> bool:
        return True

    @classmethod
    def mixed(cls, updates: Sequence[Self], weights: Sequence[float]) -> Self | None:
        """Return one update that adds sum_i weights[i] * (f_i(W) - W) for any W, and likewise for the bias.

        Args:
            updates: updates of this method, with loaded tensors.
            weights: one number per update.

        Returns:
            The mixed update; None if the method cannot express the sum.
        """
        return None

    def scaled_factors(self, W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Return s `[out]`, B `[out, r]` and A `[r, in * k]` with W' = s[:, None] * (W + B @ A) and b' = b, or None.

        Gradients flow through s, B and A as through `new_weight`; W is a constant.
        """
        return None

    def normalized(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Return m `[out]`, B `[out, r]` and A `[r, in * k]` with W' = m * V / |V| by rows, V = W + B @ A; or None.

        A merge computes such a formula in a compiled loop.
        """
        return None

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        y = layer.op(x, self.new_weight(layer.weight))
        settled = self.settled(layer.weight) if self.bias_sees_weight else self
        return y if layer.bias is None else y + layer.per_channel(settled.new_bias(layer.bias))


class OutputUpdate(Update):
    """y' = f(x, layer): a method defines `forward`, or `inside` for a formula before the layer's residual and norm.

    A layer is any module here, with or without a weight. It has these attributes and methods:

    `layer(x)`: the complete output.
    `layer.hidden(x)`: the output before a residual is added and the sum is normalised.
    `layer.residual(x)`: the value that is added, or None.
    `layer.norm(h)`: the normalised sum; h itself if the layer does not normalise.
    `layer.close(h, x, whole)`: the output for another hidden value. If `whole` is false, the output includes neither
    the residual nor the norm. `layer.mix(h, w)`: the channels of h, mixed by a matrix `[out, r]`, as a 1x1 convolution
    does. `layer.per_channel(v)`: a vector in a shape that can be added to the output. `layer.channel`: the axis of the
    channels. `layer.weight`, `layer.bias`: the current weight `[out, in, *k]` and bias; a module without a weight has
    neither. `layer.call`: the arguments of the model's own call, by name. A method lists the arguments that it needs in
    `asks`; if one is missing, an error is raised. Three entries differ from the call's own arguments. `input_ids`
    starts with the tokens of the cache. `hidden_states` is the last layer's output without the adapter. `shadow` is the
    state of a network in parallel with the model: each block reads the state by `state` and passes it on by `keep`.

    Class attributes:
        placed: True if the method defines `inside`, so that several such updates can apply before residual and norm.
        asks: arguments of the model's call that the formula needs. hears: arguments of the model's call that the
        formula uses if they are present. moves_input: True if the formula calls the layer with a changed input.
        of_model: True if the update's target is the whole model, `Target("")`, as long as its experts are missing.

    Attributes that locate an update, if the method has them:
        residual: path, relative to the target's parent, of the module whose input is added to the target's output.
        norm: path, relative to the target's parent, of the module that normalises the sum.
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
        """The number of channels that the layer's output must have; None if any number fits."""
        hidden = self.dims().get("hidden")
        return cast(int | None, hidden)

    @property
    def whole(self) -> bool:
        """Whether the result of `inside` includes the layer's residual and norm."""
        return True

    def check_against(self, shape: tuple[int, ...]) -> None:
        super().check_against(shape)
        if self.channels not in (None, shape[0]):
            raise ShapeMismatch(f"the adapter has {self.channels} channels; the layer has {shape[0]}", cure=_WRONG_BASE)

    def inside(self, x: Tensor, layer: Layer) -> Tensor:
        """Return the new value of `layer.hidden(x)`."""
        return self.forward(x, layer)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        return layer.close(self.inside(x, layer), x, self.whole)


_WRONG_BASE = "Is this the base that the adapter was trained on?"


class ContextUpdate(Update):
    """Extra context for the model: vectors or keys and values in front of the input's, or embeddings of new tokens.

    The target is the whole model, `Target("")`, or the module that the update changes: an attention or an embedding.
    No weight is involved, so the target has no layout, rows or experts. Several updates at one target are concatenated
    in the order in which they are attached, the first one in front.

    Class attributes:
        place: the name of the function below that has the formula; all other functions below add nothing.
    """

    kind = "context"
    acts_on = "the context of the model"
    place: ClassVar[str] = ""

    def embeddings(self, task: Task = None) -> torch.Tensor | None:
        """Return vectors `[n, dim]` to put before the input's embeddings, or before the encoder's if there is one.

        Args:
            task: for prompts of several tasks: one task number, or numbers `[batch]`, for which the result is `[batch,
                n, dim]`.
        """
        return None

    def decoder_embeddings(self, task: Task = None) -> torch.Tensor | None:
        """Return vectors like `embeddings` for the input of the decoder in an encoder-decoder model."""
        return None

    def past(self) -> torch.Tensor | None:
        """Return a decoder's keys and values to put before those of the input, `[layers, 2, heads, n, d]`."""
        return None

    def prefix(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return keys and values to put before those of the target attention: `[batch or 1, 2, heads, n, d]`.

        Args:
            x: the attention's input, `[batch, m, width]`.
        """
        return self.past()

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return what to add to the outputs of an attention's heads, before they are mixed: `[batch, heads, m, d]`.

        Methods with this formula store the prompt as `P`, `[n, dim]`. If `projected` is False, the result is added
        after the heads are mixed.

        Args:
            q: queries of the input, `[batch, heads, m, d]`, with positions applied.
            k: keys of the prompt, `[heads, n, d]`, without positions.
            v: values of the prompt, `[heads, n, d]`.
        """
        raise NotMergeable(f"{self.method} has no formula for attention")

    def vocabulary(self) -> torch.Tensor | None:
        """Return embeddings of new tokens, numbered after the base's last token, `[n, dim]`."""
        return None
