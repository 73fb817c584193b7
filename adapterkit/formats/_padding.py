"""Read updates of convolutions that do not pad with zeros, if the trainer computed the change with zeros.

PEFT, sd-scripts and LyCORIS build their own convolution, or call `torch.nn.functional.conv2d`, and copy only the
layer's amount of padding. So their change reads zeros around the input, whatever the layer itself reads there.
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
    """Return a LoRA that reads zeros around the input; None for an update of another method."""
    if isinstance(update, LoRA):
        from ..methods.grouped_lora import GroupedLoRA

        return GroupedLoRA(A=update.A, B=update.B, bias=update.bias, scaling=update.scaling, zero_padded=True)
    return update.replace(zero_padded=True) if isinstance(update, AcrossGroups) else None


def refused(update: Update, layer: LayerFacts, trainer: str) -> Unsupported:
    """Return the error for an update that no method here computes as its trainer did.

    Args:
        update: the update.
        layer: the layer, with its padding.
        trainer: the tool's name.
    """
    why = (
        f"{update.method} at a convolution with {layer.padding}: {trainer} trains it with zeros around the input, "
        "which no change of the weight does; the formula takes the layer's own padding"
    )
    return Unsupported(why, cure='Read it by the formula, as it is merged: compat="formula", or --compat formula')
