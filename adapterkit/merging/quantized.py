"""Quantized bases: what a merge may make of one, the choice explained, and what the output then says of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import Unsupported, UsageError
from ..quant import Dequantized, dequantized, detect, is_quantized, said_method

if TYPE_CHECKING:
    from ..tensors.checkpoint import Checkpoint

CHOICES = ("dequantize",)

WHY = (
    "the change is folded into the dequantized weights, which the adapter was trained on, and written in 16 bits; "
    "the output is no longer quantized"
)

EXPLAINED = (
    "Choose: (1) dequantize, by --quantized dequantize: fold into the dequantized weights, which the adapter was "
    "trained on, and write 16 bits; (2) requantize: merge so, and quantize the result again with the scheme's own "
    "tool, which rounds the change as coarsely as the weights; (3) original: give the 16-bit weights that the base was "
    "made from as BASE, which are closer to the first model but not what the adapter was trained on"
)


def as_merged(base: Checkpoint, quantized: str | None) -> Checkpoint:
    """The base as the merge reads it: itself, or dequantized where that was chosen.

    Raises:
        Unsupported: it is quantized and nothing was chosen, or in a way that is not known.
        UsageError: a choice that there is not.
        Malformed, ShapeMismatch: parts of a packed weight are missing, damaged or do not fit together.
    """
    if quantized is not None and quantized not in CHOICES:
        raise UsageError(f"unknown choice {quantized!r} for quantized bases", cure=f"Known: {', '.join(CHOICES)}")
    if isinstance(base, Dequantized) or not is_quantized(base):
        return base
    if quantized is None:
        raise Unsupported(f"the base is quantized ({_kind(base)})", path=base.root, cure=EXPLAINED)
    return dequantized(base)


def config_changes(base: Checkpoint) -> dict[str, Any]:
    """What the output's config says otherwise: nothing of a quantization."""
    return {"quantization_config": None} if isinstance(base, Dequantized) else {}


def quantized_record(base: Checkpoint) -> dict[str, Any] | None:
    """What was chosen, why, and for how many weights; None of a base that is not quantized."""
    if not isinstance(base, Dequantized):
        return None
    return {"choice": "dequantize", "scheme": base.scheme, "weights": len(base.packed), "why": WHY}


def _kind(base: Checkpoint) -> str:
    try:
        return detect(base)
    except Unsupported:
        return said_method(base) or "of some kind"
