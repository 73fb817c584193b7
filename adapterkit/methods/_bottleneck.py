"""The shared part of all bottleneck adapters: gate, norms and scale.  No method itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ..core.updates import attribute, tensor
from ..linalg.activations import ACTIVATIONS, layer_norm
from ._gates import row_shares
from ._sublayer import Sublayer

if TYPE_CHECKING:
    from torch import Tensor


class Narrow(Sublayer):
    """change = scaling * up(act(down(h))), multiplied by a gate if there is one; a subclass defines `change`."""

    forms: ClassVar[tuple[tuple[tuple[str, ...], ...], ...]] = (
        ((), ("gate",), ("gate", "gate_bias")),
        ((), ("norm_before", "norm_before_bias")),
        ((), ("norm_after", "norm_after_bias")),
        ((), ("scaling_factor",), ("channel_scaling",)),
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

    def change(self, h: Any, layer: Any) -> Any:
        """Down, the activation, and up: `[..., hidden]` to `[..., hidden]`."""
        raise AssertionError("each bottleneck defines it")

    def changed(self, h: Any, layer: Any) -> Any:
        change = self.ungated(h, layer)
        if self.gate is None:
            return change
        return change * row_shares(biased(layer.mix(h, self.gate), self.gate_bias, layer), layer.channel)

    def ungated(self, h: Any, layer: Any) -> Any:
        """Return the scaled change for the adapter's input."""
        read = h if self.norm_before is None else layer_norm(h, self.norm_before, self.norm_before_bias, layer.channel)
        change = self.change(read, layer) * self.scaling
        factor = self.channel_scaling if self.scaling_factor is None else self.scaling_factor
        return change if factor is None else change * layer.per_channel(factor)

    def after(self, h: Any, layer: Any) -> Any:
        return h if self.norm_after is None else layer_norm(h, self.norm_after, self.norm_after_bias, layer.channel)


def biased(h: Any, bias: Any, layer: Any) -> Any:
    """Return a mix's output plus its bias, if there is one."""
    return h if bias is None else h + layer.per_channel(bias)
