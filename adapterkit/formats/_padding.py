"""Compute a convolution's update with zero padding, as in training, for layers that themselves pad otherwise.

PEFT, sd-scripts and LyCORIS build their own convolution, or call `torch.nn.functional.conv2d`. They copy only the width
of the layer's padding. So their update reads zeros around the input, even if the layer itself pads with other values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import Unsupported
from ..methods._grouped import AcrossGroups
from ..methods.lora import LoRA

if TYPE_CHECKING:
    from ..core.updates import Update
    from ._format import LayerFacts


def lora_among_zeros(update: Update) -> Update | None:
    """Return a LoRA, grouped if needed, that pads its input with zeros; None if the update's method cannot do so."""
    if isinstance(update, LoRA):
        from ..methods.grouped_lora import GroupedLoRA

        return GroupedLoRA(A=update.A, B=update.B, bias=update.bias, scaling=update.scaling, zero_padded=True)
    return update.replace(zero_padded=True) if isinstance(update, AcrossGroups) else None


def refused(update: Update, layer: LayerFacts, trainer: str) -> Unsupported:
    """Return the error for an update if no method can compute the same function as the update's trainer.

    Args:
        update: the update.
        layer: properties of the layer, including its padding.
        trainer: the trainer's name, for the message.
    """
    why = (
        f"{update.method} on a convolution with {layer.padding}: {trainer} trained it with zeros around the input, "
        "and no change of the weight computes the same; the formula uses the layer's padding"
    )
    return Unsupported(why, cure='Read the adapter by the formula, as for merging: --compat formula (compat="formula")')
