"""Apply the user's choice among three ways to merge into a quantized base, and record the choice in the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from os import PathLike
from typing import TYPE_CHECKING

from ..errors import ShapeMismatch, TargetNotFound, Unsupported, UsageError
from ..io.checkpoint import Checkpoint, opened
from ..naming.binding.fitting import merge_record
from ..quant import Dequantized, dequantized, detect, is_quantized, stated_method
from ..quant._calibration import Calibration, read_calibration

if TYPE_CHECKING:
    from ..io.lazy import Lazy
    from ..io.strict_json import JsonValue

    Onto = Checkpoint | str | PathLike[str]

WHY = {
    "dequantize": "the adapter is merged into the dequantized weights, on which it was trained. The output has 16-bit "
    "weights, or weights of the requested dtype, and is no longer quantized",
    "requantize": "the adapter is merged into the dequantized weights, on which it was trained, and the result is "
    "quantized again in the same scheme. A change that is smaller than a quantization step may be lost, so the part "
    "that remains is measured for each target; unchanged weights keep their bytes",
    "original": "the adapter is merged into the 16-bit weights from which the base was quantized. They are closer to "
    "the original model, but the adapter was not trained on them: if it learned to correct errors of the quantization, "
    "these corrections are added too",
}
"""A map from each choice to its effect and the reason for it; the text is stored in the output's record."""

EXPLAINED = (
    "Choose one: (1) --quantized dequantize (quantized='dequantize'): merge into the dequantized weights, on which "
    "the adapter was trained, and write 16-bit weights; (2) requantize: do the same, but quantize the result again in "
    "the same scheme, which rounds the change as coarsely as the weights, and report how much of the change remains; "
    "(3) original, with --onto DIR (onto=): merge into the 16-bit weights from which the base was made, which are "
    "closer to the original model, but on which the adapter was not trained"
)


@dataclass(frozen=True, slots=True, eq=False)
class Original(Checkpoint):
    """A base that a merge uses instead of a quantized base: the 16-bit weights from which that base was made.

    Attributes:
        scheme: the quantization scheme of the base.
        weights: the number of packed weights in the base.
    """

    scheme: str = ""
    weights: int = 0


SAVED = (
    "An adapter that was trained with load_in_4bit or load_in_8bit belongs to the quantized weights: save them with "
    "from_pretrained(..., quantization_config=...).save_pretrained(DIR), and merge into DIR"
)
"""Advice for users whose base is not quantized on disk, but was quantized when the trainer loaded it."""

KEPT = ("adapter",)
"""The values of the argument `keep`."""


def as_merged(
    base: Checkpoint, quantized: str | None, onto: Onto | None = None, dtype: str | None = None,
    keep: str | None = None, calibration: str | PathLike[str] | None = None,
) -> Checkpoint:  # fmt: skip
    """Return the base that the merge reads: the base itself, the dequantized base, or the weights in `onto`.

    Args:
        base: the base.
        quantized: the choice for a quantized base, a key of `WHY`.
        onto: the 16-bit weights from which the base was made, for `original`.
        dtype: the type of the matrices in the output, if base and output are GGUF files.
        keep: what rounding must preserve, one of `KEPT`.
        calibration: the file of activations that the rounding of weights uses.

    Raises:
        TargetNotFound, ShapeMismatch: the weights in `onto` do not match the base.
        Unsupported: the base is quantized and `quantized` is None, or its scheme is unknown.
        UsageError: the choice is unknown; or `onto` is given without `original`, `keep` without `requantize`, or
            `calibration` without `keep`.
        Malformed, ShapeMismatch: parts of a packed weight are missing, damaged or do not fit together.
    """
    if quantized is not None and quantized not in WHY:
        raise UsageError(f"the choice {quantized!r} for quantized bases is unknown", cure=f"Known: {', '.join(WHY)}")
    if (onto is None) == (quantized == "original"):
        why = (
            "the 16-bit weights to merge into are missing"
            if onto is None
            else f"onto has no effect with quantized={quantized!r}"
        )
        raise UsageError(
            why, cure="Choose --quantized original (quantized=) and give the weights with --onto (onto=), or omit both"
        )
    if keep is not None and keep not in KEPT:
        raise UsageError(f"the choice {keep!r} for keep is unknown", where="keep", cure=f"Known: {', '.join(KEPT)}")
    if calibration is not None and keep is None:
        cure = "Add --keep adapter (keep='adapter'), or omit --calibration (calibration=)"
        raise UsageError("a calibration file has an effect only with keep='adapter'", where="calibration", cure=cure)
    if isinstance(base, Dequantized) or not is_quantized(base):
        if keep is not None:
            raise _nothing_rounds(base)
        if quantized in ("requantize", "original") and not isinstance(base, Dequantized):
            cure = f"Leave out --quantized (quantized=) and --onto (onto=). {SAVED}"
            raise UsageError(f"the base is not quantized, so {quantized} does not apply", path=base.root, cure=cure)
        return base
    # Quantize GGUF bases again by default, because llama.cpp loads only GGUF files.
    if quantized is None and stated_method(base) is None and detect(base) == "gguf":
        quantized = "requantize"
    if quantized is None:
        raise Unsupported(f"the base is quantized ({_kind(base)})", path=base.root, cure=EXPLAINED)
    seen = dequantized(base, packs=quantized == "requantize")
    if keep is not None and not seen.packs:
        raise _nothing_rounds(base)
    seen = replace(seen, keep=keep, calibration=None if calibration is None else read_calibration(calibration))
    if dtype is not None and seen.packs and seen.scheme == "gguf":
        from ..quant.gguf import retyped

        seen = retyped(seen, dtype)
    return seen if onto is None else _original(seen, opened(onto))


def unneeded(base: Checkpoint, quantized: str | None) -> tuple[str, ...]:
    """Return a warning if `quantized` has no effect, because the base is not quantized."""
    if quantized is None or isinstance(base, Dequantized | Original) or is_quantized(base):
        return ()
    return (f"the base is not quantized: --quantized {quantized} (quantized=) has no effect. {SAVED}",)


def _nothing_rounds(base: Checkpoint) -> UsageError:
    cure = (
        "For a quantized base, use both: --quantized requantize --keep adapter (quantized='requantize', keep='adapter')"
    )
    return UsageError("keep applies only to weights that are quantized again", path=base.root, cure=cure)


def as_read(base: Checkpoint, merged: Checkpoint, calibration: str | PathLike[str] | None = None) -> Checkpoint:
    """Return the base in the form that was read by the merge that wrote `merged`.

    A quantized base is dequantized. If `merged` is quantized, the returned base also quantizes merged weights again.

    Raises:
        UsageError: the merge was rounded with a calibration file, but no file or a different file is given.
    """
    recorded = merge_record(merged).get("quantized")
    used = _calibration_of(recorded, calibration, merged)
    if isinstance(base, Dequantized) or not is_quantized(base):
        return base
    seen = dequantized(base)
    keep = recorded.get("keep") if isinstance(recorded, dict) else None
    keep = keep if keep in KEPT else None
    if seen.scheme == "gguf" and is_quantized(merged):
        from ..quant.gguf import like

        return replace(like(dequantized(base, packs=True), merged), keep=keep, calibration=used)
    packed = {member for weight in seen.packed.values() for member in weight.members} - set(seen.tensors)
    again = packed & set(merged.tensors) or is_quantized(merged)
    return replace(dequantized(base, packs=True), keep=keep, calibration=used) if again else seen


def _calibration_of(recorded: JsonValue, given: str | PathLike[str] | None, merged: Checkpoint) -> Calibration | None:
    """Read the given calibration file, and check that the merge's record has its digest.

    Return None if no file is given and the record has none.
    """
    recorded_digest = recorded.get("calibration") if isinstance(recorded, dict) else None
    if recorded_digest is None and given is None:
        return None
    if recorded_digest is None:
        cure = "Omit --calibration (calibration=)"
        raise UsageError("the merge was not rounded with a calibration file", path=merged.root, cure=cure)
    if given is None:
        cure = "Add the file of the merge: --calibration FILE.safetensors (calibration=)"
        raise UsageError(
            "the merge was rounded with a calibration file, but none is given", path=merged.root, cure=cure
        )
    given_calibration = read_calibration(given)
    if given_calibration.digest != recorded_digest:
        cure = f"Pass the file with the sha256 {recorded_digest}: --calibration FILE.safetensors (calibration=)"
        raise UsageError("the merge was rounded with another calibration file", path=given_calibration.path, cure=cure)
    return given_calibration


def _original(base: Dequantized, onto: Checkpoint) -> Original:
    if is_quantized(onto):
        raise Unsupported(
            f"the weights in onto are themselves quantized ({_kind(onto)})",
            path=onto.root,
            cure="Pass --onto (onto=) with the 16-bit weights",
        )
    _check_same(base.tensors, onto)
    values = {field.name: getattr(onto, field.name) for field in fields(Checkpoint)}
    return Original(**values, scheme=base.scheme, weights=len(base.packed))


def _check_same(tensors: Mapping[str, Lazy], onto: Checkpoint) -> None:
    """Check that the 16-bit weights have the base's names and shapes."""
    cure = "Pass --onto (onto=) with the weights from which the base was quantized"
    for one, other, where in ((tensors, onto.tensors, "onto"), (onto.tensors, tensors, "the quantized base")):
        lost = sorted(set(one) - set(other))
        if lost:
            raise TargetNotFound(f"{where} lacks {', '.join(lost[:3])}", path=onto.root, where=lost[0], cure=cure)
    for name, tensor in tensors.items():
        if onto.tensors[name].shape != tensor.shape:
            why = f"the shape is {list(onto.tensors[name].shape)}, but {list(tensor.shape)} in the quantized base"
            raise ShapeMismatch(why, path=onto.root, where=name, cure=cure)


def config_changes(base: Checkpoint) -> dict[str, JsonValue]:
    """Return the changes of `config.json` if the output is no longer quantized, else an empty dict."""
    if not isinstance(base, Dequantized) or base.packs:
        return {}
    text = (base.config or {}).get("text_config")
    nested = (base.stored.config or {}).get("text_config") != text
    return {"quantization_config": None, **({"text_config": text} if nested else {})}


def quantized_record(base: Checkpoint) -> dict[str, JsonValue] | None:
    """Return the record of how a quantized base was merged into, as plain data; None if the base is not quantized."""
    if isinstance(base, Original):
        choice, weights = "original", base.weights
    elif isinstance(base, Dequantized):
        choice, weights = "requantize" if base.packs else "dequantize", len(base.packed)
    else:
        return None
    keep: dict[str, JsonValue] = {}
    if isinstance(base, Dequantized) and base.keep is not None:
        keep["keep"] = base.keep
        if base.calibration is not None:
            keep["calibration"] = base.calibration.digest
    return {"choice": choice, "scheme": base.scheme, "weights": weights, **keep, "why": WHY[choice]}


def _kind(base: Checkpoint) -> str:
    try:
        return detect(base)
    except Unsupported:
        return stated_method(base) or "unknown scheme"
