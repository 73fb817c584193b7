"""What bottleneck adapters of all makes share: gate, norms and scale, and where they stand in a transformer's block.

A sub-layer of a block ends in `norm(hidden + residual)`, in some models without the norm. The names of the attributes
are AdapterHub's, https://docs.adapterhub.ml/classes/adapter_config.html, whose every option this covers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import ShapeMismatch
from ..tensors.activations import ACTIVATIONS, layer_norm, sigmoid
from ..updates import OutputUpdate, attribute, tensor

if TYPE_CHECKING:
    from torch import Tensor


class Sublayer(OutputUpdate):
    """h' = h + scaling * change(h), or h + scaling * change(residual) in parallel; a subclass defines `change`."""

    placed = True
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
            why = f"stands parallel to a layer of {list(shape[:2])} outputs and inputs"
            raise ShapeMismatch(why, cure="Name the residual to read")

    def change(self, h: Any, layer: Any) -> Any:
        """Down, the activation, and up: `[..., hidden]` to `[..., hidden]`."""
        raise AssertionError("each bottleneck defines it")

    def inside(self, x: Any, layer: Any) -> Any:
        hidden, residual = layer.hidden(x), layer.residual(x)
        if self.parallel:
            return hidden + self._after(self._scaled(x if residual is None else residual, layer), layer)
        read, skip = self.read(hidden, residual, layer)
        change = self._scaled(read, layer)
        return (
            self._after(change + skip, layer) if self.adapter_residual_before_ln else self._after(change, layer) + skip
        )

    def read(self, hidden: Any, residual: Any, layer: Any) -> tuple[Any, Any]:
        """What the adapter reads, and what its own residual goes past it with."""
        added = hidden if residual is None or not self.original_ln_before else hidden + residual
        read = layer.norm(added) if self.original_ln_before else hidden
        return read, {"true": hidden, "post_add": added, "false": read}[self.residual_before_ln]

    def _scaled(self, h: Any, layer: Any) -> Any:
        change = self.ungated(h, layer)
        return change if self.gate is None else change * self._gate(h, layer)

    def ungated(self, h: Any, layer: Any) -> Any:
        """The change that it makes of what it reads, scaled."""
        read = h if self.norm_before is None else layer_norm(h, self.norm_before, self.norm_before_bias, layer.channel)
        change = self.change(read, layer) * self.scaling
        factor = self.channel_scaling if self.scaling_factor is None else self.scaling_factor
        return change if factor is None else change * layer.per_channel(factor)

    def _gate(self, h: Any, layer: Any) -> Any:
        """A share for each row: the mean over all places of it."""
        logits = layer.mix(h, self.gate)
        logits = logits if self.gate_bias is None else logits + layer.per_channel(self.gate_bias)
        channel = layer.channel % h.ndim
        places = tuple(axis for axis in range(1, h.ndim) if axis != channel)
        share = sigmoid(logits)
        return share.mean(places, keepdims=True) if places else share

    def _after(self, h: Any, layer: Any) -> Any:
        return h if self.norm_after is None else layer_norm(h, self.norm_after, self.norm_after_bias, layer.channel)


def biased(h: Any, bias: Any, layer: Any) -> Any:
    """A mix's output with its bias, if it has one."""
    return h if bias is None else h + layer.per_channel(bias)
