"""Base classes of bottleneck adapters. They apply the gate, the norms and the scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ..core.updates import OutputUpdate, Rule, attribute, tensor
from ..errors import Unsupported
from ..linalg.activations import ACTIVATIONS, layer_norm, sigmoid
from ..linalg.namespace import namespace

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates.update import Layer


def row_shares(logits: Tensor, channel: int = -1) -> Tensor:
    """Return the mean of `sigmoid(logits)` over all axes except axis 0 (the rows of the batch) and `channel`."""
    channel %= logits.ndim
    places = tuple(axis for axis in range(1, logits.ndim) if axis != channel)
    shares = sigmoid(logits)
    return namespace(shares).mean(shares, axis=places, keepdims=True) if places else shares


def gated(P: Tensor, x: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    """Multiply the keys and values P `[1, 2, heads, n, d]` by gates that depend on x `[batch, m, width]`.

    Each row of the batch has its own gates. If `gate` has one row, the keys and the values get the same factor; if
    `gate` has two rows, they get separate factors. The result has the shape `[batch, 2, heads, n, d]`.
    """
    return P * row_shares(x @ gate.mT + bias).swapaxes(1, 2)[..., None, None]


class Sublayer(OutputUpdate):
    """h' = h + change(h), or h' = h + change(residual) if the adapter is parallel.

    h is the sub-layer's output before the residual is added. A parallel adapter reads the sub-layer's input if the
    residual is unknown.
    """

    placed = True
    parallel: bool = False
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: str = attribute("true", among=("true", "false", "post_add"))
    adapter_residual_before_ln: bool = False
    residual: str = ""
    norm: str = ""

    @property
    def whole(self) -> bool:
        return self.original_ln_after

    def check_against(self, shape: tuple[int, ...]) -> None:
        super().check_against(shape)
        if self.parallel and not self.residual and shape[1:2] != shape[:1]:
            why = f"the adapter runs parallel to a layer whose numbers of inputs and outputs differ: {list(shape[:2])}"
            raise Unsupported(why, cure="Pass residual=, the path of the module whose input is the residual")

    def changed(self, h: Tensor, layer: Layer) -> Tensor:
        """Return the change that the adapter computes from its input h."""
        raise AssertionError("each subclass defines it")

    def after(self, h: Tensor, layer: Layer) -> Tensor:
        """Apply the adapter's output norm, if it has one."""
        return h

    def inside(self, x: Tensor, layer: Layer) -> Tensor:
        hidden, residual = layer.hidden(x), layer.residual(x)
        if self.parallel:
            return hidden + self.after(self.changed(x if residual is None else residual, layer), layer)
        read, skip = self.read(hidden, residual, layer)
        change, first = self.changed(read, layer), self.adapter_residual_before_ln
        return self.after(change + skip, layer) if first else self.after(change, layer) + skip

    def read(self, hidden: Tensor, residual: Tensor | None, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return (the adapter's input, the value that its skip connection adds to the change)."""
        added = hidden if residual is None or not self.original_ln_before else hidden + residual
        read = layer.norm(added) if self.original_ln_before else hidden
        return read, {"true": hidden, "post_add": added, "false": read}[self.residual_before_ln]


class Narrow(Sublayer):
    """Adds scaling * up(act(down(h))), times a gate if present. Subclasses compute up(act(down(h))) in `change`."""

    forms: ClassVar[tuple[tuple[tuple[str, ...], ...], ...]] = (
        ((), ("gate",), ("gate", "gate_bias")),
        ((), ("norm_before", "norm_before_bias")),
        ((), ("norm_after", "norm_after_bias")),
        ((), ("scaling_factor",), ("channel_scaling",)),
    )
    fits: ClassVar[tuple[Rule, ...]] = (
        Rule(require="hidden == out", meaning="the adapter was made for another number of channels"),
    )

    gate: Tensor | None = tensor("1 hidden", optional=True)
    gate_bias: Tensor | None = tensor("1", optional=True)
    norm_before: Tensor | None = tensor("hidden", optional=True)
    norm_before_bias: Tensor | None = tensor("hidden", optional=True)
    norm_after: Tensor | None = tensor("hidden", optional=True)
    norm_after_bias: Tensor | None = tensor("hidden", optional=True)
    scaling_factor: Tensor | None = tensor("1", optional=True)
    channel_scaling: Tensor | None = tensor("hidden", optional=True)
    non_linearity: str = attribute("relu", among=ACTIVATIONS)
    scaling: float = 1.0

    def change(self, h: Tensor, layer: Layer) -> Tensor:
        """Return up(act(down(h))): `[..., hidden]` to `[..., hidden]`."""
        raise AssertionError("each bottleneck defines it")

    def changed(self, h: Tensor, layer: Layer) -> Tensor:
        change = self.ungated(h, layer)
        if self.gate is None:
            return change
        shares: Tensor = row_shares(biased(layer.mix(h, self.gate), self.gate_bias, layer), layer.channel)
        return change * shares

    def ungated(self, h: Tensor, layer: Layer) -> Tensor:
        """Return the scaled change for the adapter's input h, without the gate's factor."""
        read = h if self.norm_before is None else layer_norm(h, self.norm_before, self.norm_before_bias, layer.channel)
        change = self.change(read, layer) * self.scaling
        factor = self.channel_scaling if self.scaling_factor is None else self.scaling_factor
        return change if factor is None else change * layer.per_channel(factor)

    def after(self, h: Tensor, layer: Layer) -> Tensor:
        return h if self.norm_after is None else layer_norm(h, self.norm_after, self.norm_after_bias, layer.channel)


def biased(h: Tensor, bias: Tensor | None, layer: Layer) -> Tensor:
    """Return h plus the bias, or h if the bias is None."""
    return h if bias is None else h + layer.per_channel(bias)
