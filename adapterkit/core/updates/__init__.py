"""The four kinds of updates. An update is the change that one method makes at one target, such as a weight.

The kinds are `Additive` (a change that is added to the weight), `WeightUpdate` (a function of the weight),
`OutputUpdate` (a function of a layer's output) and `ContextUpdate` (extra context). Only updates of the first two kinds
can be merged into weights. A method is a subclass of one kind. It declares fields with shape strings, and one formula.
All other functions are derived from the fields and the formula. A formula gets each weight as `[out, in, *k]`, even if
the base stores the weight in another axis order.

Formulas run in the caller's floating dtype: float64 in a merge, the model's dtype in a live model. The type hints name
torch tensors, but formulas use only operations that numpy arrays have too (operators, indexing, `reshape`, `sum`,
`.mT`), so a merge on the CPU does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

from ...errors import USE_ITS_BASE, NotMergeable, ShapeMismatch
from ..shapes import Rule, attribute, tensor
from .update import Update

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from .update import Layer
    from .update import Random as Random

    Task = int | torch.Tensor | None
    """The index of the batch's task, or a tensor `[batch]` with one index for each row; None if there are no tasks."""

__all__ = [
    "Additive",
    "ContextUpdate",
    "OutputUpdate",
    "Rule",
    "Update",
    "WeightUpdate",
    "attribute",
    "of_pair",
    "tensor",
]


_Function = TypeVar("_Function")


def of_pair(forward: _Function) -> _Function:
    """Mark a `forward` that computes `layer(x) + mix(op(x, A), B) + d`, so that backends may use a faster computation.

    B and A are the result of `pair`, and d is the result of `bias_delta`. If a method overrides `forward` without this
    decorator, backends always call that `forward`, because it may compute something else. For example, its output may
    depend on the tokens.
    """
    forward.of_pair = True  # type: ignore[attr-defined]
    return forward


class Additive(Update):
    """An update that adds D to the weight W, and d to the bias b: `W' = W + D` and `b' = b + d`.

    D and d do not depend on W.

    Class attributes:
        thin: True if `forward` is decorated with `of_pair`. A backend may then compute the output from the factors that
            `pair` returns.
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
        """Return D `[out, in, *k]`, the change of a weight that has this shape."""
        raise NotMergeable(f"{self.method} has no formula")

    def bias_delta(self) -> torch.Tensor | None:
        """Return d `[out]`, or None if the bias does not change."""
        return None

    def pair(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return B `[out, r]` and A `[r, in * k]` with `D = B @ A`; None if the formula is not a low-rank product."""
        return None

    def factors(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """Return B, A and s with `D = s * B @ A`; None if `pair` returns None.

        A method overrides this function to keep its scaling s separate from B.
        """
        pair = self.pair(shape)
        return None if pair is None else (*pair, 1.0)

    def scaled(self, weight: float) -> Self | None:
        """Return an update of the same method that changes the weight by `weight * D` and the bias by `weight * d`.

        Return None if such an update cannot be made without reading the tensors.
        """
        scaling = self.attributes.get("scaling")
        return None if scaling is None else self.replace(scaling=weight * scaling)

    def delta_norm(self, shape: tuple[int, ...]) -> float:
        """Return the Frobenius norm of D. A method overrides this function to compute the norm without computing D."""
        D = self.delta(shape)
        return math.sqrt(float((D * D).sum()))

    def delta_into(self, D: torch.Tensor, weight: float) -> None:
        """Multiply the change by `weight`, and write it into the array `D`, whose shape is the weight's shape.

        A method may override this function to avoid a copy.
        """
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
    """An update that computes a new weight from the weight, `W' = f(W)`, and a new bias from the bias, `b' = g(b)`."""

    kind = "weight"

    @property
    def changes_weight(self) -> bool:
        return True

    @classmethod
    def mixed(cls, updates: Sequence[Self], weights: Sequence[float]) -> Self | None:
        """Combine several updates into one update, which adds `sum_i weights[i] * (f_i(W) - W)` to any weight W.

        f_i is the formula of `updates[i]`. The changes of the bias are summed in the same way.

        Args:
            updates: updates of this method, with loaded tensors.
            weights: the factor of each update in the sum.

        Returns:
            The combined update; None if the method cannot express the sum.
        """
        return None

    def scaled_factors(self, W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Return s `[out]`, B `[out, r]` and A `[r, in * k]`, such that `W' = s[:, None] * (W + B @ A)` and `b' = b`.

        Return None if the formula does not have this form. W counts as a constant, so it gets no gradient. The update's
        tensors get the same gradients through s, B and A as through `new_weight`.
        """
        return None

    def normalized(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Return m `[out]`, B `[out, r]` and A `[r, in * k]`, such that `W' = m * V / |V|` and `V = W + B @ A`.

        |V| is the norm of each row of V. Return None if the formula does not have this form. If it has this form, a
        merge computes W' in a compiled loop.
        """
        return None

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        y = layer.op(x, self.new_weight(layer.weight))
        settled = self.settled(layer.weight) if self.bias_sees_weight else self
        return y if layer.bias is None else y + layer.per_channel(settled.new_bias(layer.bias))


class OutputUpdate(Update):
    """An update that computes a layer's new output from the layer and its input: `y' = f(x, layer)`.

    A method defines `forward`. If the method changes the output before a residual is added and the sum is normalised,
    the method defines `inside` instead.

    A `layer` is any module, with or without a weight. It has these attributes and methods:

    `layer(x)`: the complete output.
    `layer.hidden(x)`: the output before a residual is added and the sum is normalised.
    `layer.residual(x)`: the residual that is added to the output, or None.
    `layer.norm(h)`: the normalised h, where h is the sum of output and residual; h itself if the layer has no norm.
    `layer.close(h, x, whole)`: the output that the layer would have if `layer.hidden(x)` were h. If `whole` is false,
        this output includes neither the residual nor the norm.
    `layer.mix(h, w)`: the channels of h, multiplied by the matrix w `[out, r]`, as in a 1x1 convolution.
    `layer.per_channel(v)`: the vector v `[out]`, in a shape that can be added to the output.
    `layer.channel`: the index of the channel axis in the output.
    `layer.weight`, `layer.bias`: the current weight `[out, in, *k]` and bias; a module without a weight has neither.
    `layer.call`: the arguments with which the model was called, keyed by name. The class attribute `asks` lists the
        arguments that the method needs. If one of them is missing, an error is raised. Three arguments are special.
        `input_ids` contains first the earlier tokens, whose keys and values are in the cache, and then the tokens of
        the call. `hidden_states` is the last layer's output without the adapter. `shadow` holds the state of a side
        network, which runs in parallel with the model. At each block, the formula calls `shadow.state(update)` to read
        this state, and `shadow.keep(state)` to set the state for the next block.

    Class attributes:
        placed: True if the method defines `inside`. If several updates of a layer define `inside`, all of them can
            change the output before the residual is added and the sum is normalised.
        asks: arguments of the model's call that the formula needs.
        hears: arguments of the model's call that the formula uses if they are present.
        moves_input: True if the formula calls the layer with a changed input.
        of_model: True if the target may be the whole model, `Target("")`. For example, an X-LoRA update of the
            whole model contains only the router, not the experts.

    The updates of some methods also have these attributes, which locate the residual and the norm:
        residual: the path of the module whose input is added to the target's output. The path is relative to the
            target's parent.
        norm: the path of the module that normalises the sum of output and residual. This path is also relative to the
            target's parent.
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
        """Whether the update is a router whose experts are missing; such a router cannot run."""
        return False

    @property
    def channels(self) -> int | None:
        """The number of channels that the layer's output must have; None if any number fits."""
        hidden = self.dims().get("hidden")
        return cast(int | None, hidden)

    @property
    def whole(self) -> bool:
        """Whether the residual and the norm are applied to the result of `inside`."""
        return True

    def check_against(self, shape: tuple[int, ...]) -> None:
        super().check_against(shape)
        if self.channels not in (None, shape[0]):
            raise ShapeMismatch(
                f"the adapter has {self.channels} channels; the layer has {shape[0]}", cure=USE_ITS_BASE
            )

    def inside(self, x: Tensor, layer: Layer) -> Tensor:
        """Return the new value of `layer.hidden(x)`."""
        return self.forward(x, layer)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        return layer.close(self.inside(x, layer), x, self.whole)


class ContextUpdate(Update):
    """An update that gives the model extra context: a prompt before the input, or embeddings of new tokens.

    A prompt consists of vectors before the input's embeddings, or of keys and values before the input's keys and
    values. The target is the whole model, `Target("")`, or the module that the update changes. This module is an
    attention module or an embedding. No weight is involved, so the target has no layout, rows or experts. If a target
    has several updates, their vectors are concatenated in the order in which the updates are attached.

    Class attributes:
        place: which of the functions below the subclass overrides, such as `embeddings` or `past`.
    """

    kind = "context"
    acts_on = "the context of the model"
    place: ClassVar[str] = ""

    def embeddings(self, task: Task = None) -> torch.Tensor | None:
        """Return vectors `[n, dim]` to put before the embeddings of the model's input.

        In an encoder-decoder model, the input is the encoder's input.

        Args:
            task: if the prompt depends on a task, the index of the batch's task, or an array `[batch]` with the index
                of each row's task. With an array, the result has the shape `[batch, n, dim]`.
        """
        return None

    def decoder_embeddings(self, task: Task = None) -> torch.Tensor | None:
        """Return vectors to put before the embeddings of the decoder's input, in an encoder-decoder model."""
        return None

    def past(self) -> torch.Tensor | None:
        """Return keys and values `[layers, 2, heads, n, d]` to put before the keys and values of a decoder's input."""
        return None

    def prefix(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return keys and values `[batch or 1, 2, heads, n, d]` to put before the attention module's keys and values.

        Args:
            x: the attention module's input, `[batch, m, width]`.
        """
        return self.past()

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return the change that the prompt adds to the output of each attention head: `[batch, heads, m, d]`.

        Methods with this formula store the prompt as `P`, `[n, dim]`. If the attribute `projected` is True, the change
        is added before the attention module's output projection. If not, it is added after the projection.

        Args:
            q: queries of the input, `[batch, heads, m, d]`, after the position encoding.
            k: keys of the prompt, `[heads, n, d]`, without position encoding.
            v: values of the prompt, `[heads, n, d]`.
        """
        raise NotMergeable(f"{self.method} has no formula for attention")

    def vocabulary(self) -> torch.Tensor | None:
        """Return embeddings `[n, dim]` of new tokens, whose ids follow the base's last token id."""
        return None


# If a target has several updates, they are chained: `Composed` is a layer with one update, and the next update is
# applied to the `Composed`. The first layer of the chain comes from a backend, and implements `Layer` (update.py).


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
