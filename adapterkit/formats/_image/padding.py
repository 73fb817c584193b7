"""Convolutions of image models that pad otherwise than with zeros; see `formats._padding`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._format import Departure
from .._padding import lora_among_zeros, refused

if TYPE_CHECKING:
    from ...core.updates import Update
    from .._format import LayerFacts


def zero_padded(update: Update, layer: LayerFacts) -> Update:
    """Return the update as its trainer's forward computes it at a convolution that pads otherwise than with zeros.

    Raises:
        Unsupported: no method here computes that.
    """
    if not layer.padding.startswith("padding_mode") or update.kind not in ("additive", "weight", "output"):
        return update
    changed = lora_among_zeros(update)
    if changed is None or "dilation" in layer.padding:
        raise refused(update, layer, "its trainer")
    return changed


PADDING = {
    "convolution_padding": Departure(
        "at a convolution whose padding_mode is not zeros, which only a live layer tells: the change reads zeros "
        "around the input; methods other than LoRA are refused there",
        "the change of the weight, with the padding of the layer, as it is merged",
        zero_padded,
    )
}
"""Beside the base's own forward, trainers call a convolution of theirs, with the layer's amount of padding alone."""
