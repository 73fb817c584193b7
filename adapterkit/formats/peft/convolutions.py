"""Compute adapters of convolutions as PEFT does, where PEFT's forward is not equivalent to a change of the weight.

PEFT's LoRA creates `lora_A` with the class, kernel, stride and padding of the base layer, but without the base layer's
padding mode and dilation. So `lora_A` pads with zeros and is not dilated, even if the base layer pads otherwise or is
dilated. PEFT's other methods call `torch.nn.functional.conv2d` with the base layer's padding, which also pads with
zeros. OFT rotates the patches of the input.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...methods.dora import DoRA
from ...methods.grouped_dora import GroupedDoRA
from ...methods.ia3 import IA3
from ...methods.oft import OFT
from ...methods.oft_patches import OFTPatches
from ...methods.replacement import Replacement
from .._padding import lora_among_zeros, refused

if TYPE_CHECKING:
    from ...core.updates import Update
    from .._format import LayerFacts

UNPADDED = (IA3, OFTPatches, Replacement)
"""The methods whose forward in PEFT calls the base layer, and so has the base layer's padding."""


def turns_patches(shape: tuple[int, ...]) -> bool:
    """Whether PEFT's OFT rotates patches of the input for a weight of this shape: a Conv2d with a kernel above 1."""
    return len(shape) == 4 and math.prod(shape[2:]) > 1


def on_patches(update: Update, layer: LayerFacts) -> Update:
    """Return an OFT update as PEFT's forward computes it at this layer."""
    if not isinstance(update, OFT) or update.side == "out" or not turns_patches(layer.shape) or update.pairs is None:
        return update
    same = {name: getattr(update, name) for name in ("terms", "doubled", "coft", "eps")}
    return OFTPatches(pairs=update.pairs, **same)


def zero_padded(update: Update, layer: LayerFacts) -> Update:
    """Return the update as PEFT's forward computes it on a convolution whose padding is not zeros.

    Raises:
        Unsupported: no method of adapterkit computes PEFT's forward at this layer.
    """
    if not layer.padding or isinstance(update, UNPADDED) or update.kind not in ("additive", "weight", "output"):
        return update
    if isinstance(update, DoRA):
        pair = {name: getattr(update, name) for name in ("A", "B", "magnitude", "scaling")}
        return GroupedDoRA(**pair, zero_padded=True)
    changed = lora_among_zeros(update)
    if changed is None:
        raise refused(update, layer, "PEFT")
    return changed
