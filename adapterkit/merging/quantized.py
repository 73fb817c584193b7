"""Quantized bases: the three ways to merge into one, and the record of the choice in the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from typing import TYPE_CHECKING

from ..errors import ShapeMismatch, TargetNotFound, Unsupported, UsageError
from ..io.checkpoint import Checkpoint, opened
from ..quant import Dequantized, dequantized, detect, is_quantized, said_method

if TYPE_CHECKING:
    from ..io.lazy import Lazy
    from ..io.strict_json import JsonValue

    Onto = Checkpoint | str | PathLike[str]

WHY = {
    "dequantize": "the change is added to the dequantized weights, on which the adapter was trained, and written in "
    "16 bits; the output is not quantized",
    "requantize": "the change is added to the dequantized weights, on which the adapter was trained, and the result "
    "is quantized again in the same scheme, which rounds it as coarsely as the weights: a change smaller than a step "
    "may be lost, and the remaining part is measured for each target; unchanged weights keep their bytes",
    "original": "the change is added to the 16-bit weights from which the base was quantized. They are closer to "
    "the first model, but the adapter was not trained on them: its corrections of the quantization are added too",
}
"""Choice -> its effect and the reason to choose it, for the output's record."""

EXPLAINED = (
    "Choose one: (1) quantized=/--quantized dequantize: merge into the dequantized weights, on which the adapter was "
    "trained, and write 16 bits; (2) requantize: do the same, but quantize the result again in the same scheme, which "
    "rounds the change as coarsely as the weights, and report how much of the change remains; (3) original, with "
    "onto=/--onto DIR: merge into the 16-bit weights from which the base was made, which are closer to the first "
    "model, but on which the adapter was not trained"
)


@dataclass(frozen=True, slots=True, eq=False)
class Original(Checkpoint):
    """The 16-bit weights that are used instead of a quantized base.

    Attributes:
        scheme: the quantization scheme of the base.
        weights: the number of packed weights in the base.
    """

    scheme: str = ""
    weights: int = 0


def as_merged(
    base: Checkpoint, quantized: str | None, onto: Onto | None = None, dtype: str | None = None
) -> Checkpoint:
    """Return the base as the merge reads it: unchanged, dequantized, or the 16-bit weights from which it was made.

    Args:
        base: the base.
        quantized: the choice for a quantized base, a key of `WHY`.
        onto: the 16-bit weights, for `original`.
        dtype: the type of the output's matrices, if base and output are GGUF files.

    Raises:
        TargetNotFound, ShapeMismatch: the weights in `onto` do not match the base.
        Unsupported: the base is quantized and `quantized` is None, or its scheme is unknown.
        UsageError: the choice is unknown, or `onto` is given without `original`.
        Malformed, ShapeMismatch: parts of a packed weight are missing, damaged or do not fit together.
    """
    if quantized is not None and quantized not in WHY:
        raise UsageError(f"the choice {quantized!r} for quantized bases is unknown", cure=f"Known: {', '.join(WHY)}")
    if (onto is None) == (quantized == "original"):
        why = "the 16-bit weights to merge into are missing" if onto is None else f"onto does not apply to {quantized}"
        raise UsageError(
            why, cure="Choose --quantized original (quantized=) and give the weights by --onto (onto=), or omit both"
        )
    if isinstance(base, Dequantized) or not is_quantized(base):
        return base
    # Requantize GGUF bases by default: they are made for llama.cpp, which loads nothing else.
    if quantized is None and said_method(base) is None and detect(base) == "gguf":
        quantized = "requantize"
    if quantized is None:
        raise Unsupported(f"the base is quantized ({_kind(base)})", path=base.root, cure=EXPLAINED)
    seen = dequantized(base, packs=quantized == "requantize")
    if dtype is not None and seen.packs and seen.scheme == "gguf":
        from ..quant.gguf import retyped

        seen = retyped(seen, dtype)
    return seen if onto is None else _original(seen, opened(onto))


def as_read(base: Checkpoint, merged: Checkpoint) -> Checkpoint:
    """Return the base as the merge that wrote `merged` must have read it: dequantized, or set to be quantized again."""
    if isinstance(base, Dequantized) or not is_quantized(base):
        return base
    seen = dequantized(base)
    if seen.scheme == "gguf" and is_quantized(merged):
        from ..quant.gguf import like

        return like(dequantized(base, packs=True), merged)
    packed = {member for weight in seen.packed.values() for member in weight.members} - set(seen.tensors)
    return dequantized(base, packs=True) if packed & set(merged.tensors) or is_quantized(merged) else seen


def _original(base: Dequantized, onto: Checkpoint) -> Original:
    if is_quantized(onto):
        raise Unsupported(
            f"the weights are themselves quantized ({_kind(onto)})", path=onto.root, cure="Give the 16-bit weights"
        )
    _check_same(base.tensors, onto)
    held = {field.name: getattr(onto, field.name) for field in fields(Checkpoint)}
    return Original(**held, scheme=base.scheme, weights=len(base.packed))


def _check_same(tensors: Mapping[str, Lazy], onto: Checkpoint) -> None:
    """Check that the 16-bit weights have the names and shapes of the base."""
    cure = "Give the weights that the base was quantized from"
    for one, other, where in ((tensors, onto.tensors, "onto"), (onto.tensors, tensors, "the quantized base")):
        lost = sorted(set(one) - set(other))
        if lost:
            raise TargetNotFound(f"{where} lacks {', '.join(lost[:3])}", path=onto.root, where=lost[0], cure=cure)
    for name, tensor in tensors.items():
        if onto.tensors[name].shape != tensor.shape:
            why = f"the shape is {list(onto.tensors[name].shape)}, but {list(tensor.shape)} in the quantized base"
            raise ShapeMismatch(why, path=onto.root, where=name, cure=cure)


def config_changes(base: Checkpoint) -> dict[str, JsonValue]:
    """Return the changes of `config.json`: the quantization is removed, unless the output is quantized again."""
    if not isinstance(base, Dequantized) or base.packs:
        return {}
    text = (base.config or {}).get("text_config")
    nested = (base.stored.config or {}).get("text_config") != text
    return {"quantization_config": None, **({"text_config": text} if nested else {})}


def quantized_record(base: Checkpoint) -> dict[str, JsonValue] | None:
    """Return the choice, its reason and the number of packed weights; None if the base is not quantized."""
    if isinstance(base, Original):
        choice, weights = "original", base.weights
    elif isinstance(base, Dequantized):
        choice, weights = "requantize" if base.packs else "dequantize", len(base.packed)
    else:
        return None
    return {"choice": choice, "scheme": base.scheme, "weights": weights, "why": WHY[choice]}


def _kind(base: Checkpoint) -> str:
    try:
        return detect(base)
    except Unsupported:
        return said_method(base) or "of some kind"
