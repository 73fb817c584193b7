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
    "quantized again in the same scheme. A change that is smaller than a quantization step may be lost, so the report "
    "shows for each weight how much of the change remains. Unchanged weights keep their bytes",
    "original": "the adapter is merged into the 16-bit weights from which the base was quantized. They are closer to "
    "the original model, but the adapter was not trained on them. If the adapter learned to correct quantization "
    "errors, the merge adds these corrections, although the 16-bit weights do not have the errors",
}
"""A map from each value of `quantized` to an explanation, which is stored in the output's record."""

EXPLAINED = (
    "Choose one. (1) --quantized dequantize (quantized='dequantize') merges into the dequantized weights, on which "
    "the adapter was trained, and writes 16-bit weights. (2) --quantized requantize (quantized='requantize') merges "
    "into the dequantized weights, and quantizes the result again in the same scheme. This rounds the change as "
    "coarsely as the weights; the report shows how much of the change remains. (3) --quantized original --onto DIR "
    "(quantized='original', onto='DIR') merges into the 16-bit weights from which the base was made. They are closer "
    "to the original model, but the adapter was not trained on them"
)


@dataclass(frozen=True, slots=True, eq=False)
class Original(Checkpoint):
    """A base that a merge uses instead of a quantized base: the 16-bit weights from which that base was made.

    Attributes:
        scheme: the scheme of the quantized base.
        weights: the number of packed weights in the quantized base.
    """

    scheme: str = ""
    weights: int = 0


SAVED = (
    "With load_in_4bit or load_in_8bit, an adapter is trained on quantized weights: save these "
    "weights with from_pretrained(..., quantization_config=...).save_pretrained(DIR), and merge into DIR"
)
"""Advice for users whose base is not quantized on disk, but was quantized when the trainer loaded it."""

KEPT = ("adapter",)
"""The values that the argument `keep` may have. `adapter` means that rounding preserves the adapter's change."""


def as_merged(
    base: Checkpoint, quantized: str | None, onto: Onto | None = None, dtype: str | None = None,
    keep: str | None = None, calibration: str | PathLike[str] | None = None,
) -> Checkpoint:  # fmt: skip
    """Return the base that the merge reads: the base itself, the dequantized base, or the weights in `onto`.

    Args:
        base: the base.
        quantized: the choice for a quantized base, a key of `WHY`.
        onto: the 16-bit weights from which the base was made, for `original`.
        dtype: the GGUF type of the output's matrices, such as `Q8_0`, if a GGUF base is quantized again; for other
            bases, the argument has no effect here.
        keep: what rounding must preserve, one of `KEPT`.
        calibration: a file of recorded activations, which `keep` uses to round the weights.

    Raises:
        TargetNotFound, ShapeMismatch: the weights in `onto` do not match the base.
        Unsupported: `quantized` is None, and the base is quantized, but not a GGUF model; or the base's scheme is
            unknown.
        UsageError: a choice is unknown; or only one of `original` and `onto` is given; or `keep` is given, but no
            weight is quantized again; or `calibration` is given without `keep`.
        Malformed, ShapeMismatch: stored tensors of a packed weight are missing, damaged or do not fit together.
    """
    if quantized is not None and quantized not in WHY:
        raise UsageError(f"the choice {quantized!r} for quantized bases is unknown", cure=f"Known: {', '.join(WHY)}")
    if (onto is None) == (quantized == "original"):
        why = (
            "the 16-bit weights to merge into are missing"
            if onto is None
            else f"--onto (onto=) has no effect with quantized={quantized!r}"
        )
        raise UsageError(
            why, cure="Pass --quantized original --onto DIR (quantized='original', onto='DIR'), or omit both"
        )
    if keep is not None and keep not in KEPT:
        raise UsageError(f"the value {keep!r} of keep is unknown", where="keep", cure=f"Known: {', '.join(KEPT)}")
    if calibration is not None and keep is None:
        cure = "Also pass --keep adapter (keep='adapter'), or omit --calibration (calibration=)"
        raise UsageError("a calibration file has an effect only with keep='adapter'", where="calibration", cure=cure)
    if isinstance(base, Dequantized) or not is_quantized(base):
        if keep is not None:
            raise _nothing_rounds(base)
        if quantized in ("requantize", "original") and not isinstance(base, Dequantized):
            cure = f"Omit --quantized (quantized=) and --onto (onto=). {SAVED}"
            raise UsageError(f"the base is not quantized, so {quantized} does not apply", path=base.root, cure=cure)
        return base
    # Quantize GGUF bases again by default, because llama.cpp loads only GGUF files.
    if quantized is None and stated_method(base) is None and detect(base) == "gguf":
        quantized = "requantize"
    if quantized is None:
        raise Unsupported(f"the base is quantized ({_kind(base)})", path=base.root, cure=EXPLAINED)
    seen = dequantized(base, packs=quantized == "requantize")
    if quantized == "dequantize" and seen.scheme == "awq":
        _check_activations(seen)
    if keep is not None and not seen.packs:
        raise _nothing_rounds(base)
    seen = replace(seen, keep=keep, calibration=None if calibration is None else read_calibration(calibration))
    if dtype is not None and seen.packs and seen.scheme == "gguf":
        from ..quant.gguf import retyped

        seen = retyped(seen, dtype)
    return seen if onto is None else _original(seen, opened(onto))


def _check_activations(base: Dequantized) -> None:
    """Check that no activation of an AWQ base divides its outputs by scales.

    AutoAWQ multiplies the weight that reads these outputs by the same scales. A model that is not AWQ does not divide
    the outputs, so it would compute other results with this weight.

    Raises:
        Unsupported: an activation has scales.
    """
    scales = next((name for name in base.tensors if name.endswith(".scales")), None)
    if scales is not None:
        why = "the base's activation divides its outputs by these scales, but an unquantized model would not"
        cure = (
            "Pass --quantized requantize (quantized='requantize'), or --quantized original --onto DIR "
            "(quantized='original', onto='DIR')"
        )
        raise Unsupported(why, path=base.root, where=scales, cure=cure)


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
    """Return the base in the form in which the merge read it. `merged` is the merge's output.

    If the base is quantized, return a `Dequantized`. If `merged` is quantized too, this `Dequantized` has `packs=True`,
    so a merge into it quantizes the merged weights again.

    Raises:
        UsageError: `calibration` is missing, or is not the calibration file that the merge used.
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
    """Read the calibration file `given`, and check that its digest equals the digest in the merge's record.

    Return None if no file is given and the record has no digest.
    """
    recorded_digest = recorded.get("calibration") if isinstance(recorded, dict) else None
    if recorded_digest is None and given is None:
        return None
    if recorded_digest is None:
        cure = "Omit --calibration (calibration=)"
        raise UsageError("the merge did not use a calibration file", path=merged.root, cure=cure)
    if given is None:
        cure = "Pass the calibration file of the merge: --calibration FILE.safetensors (calibration=)"
        raise UsageError("the merge used a calibration file, but none is given", path=merged.root, cure=cure)
    given_calibration = read_calibration(given)
    if given_calibration.digest != recorded_digest:
        cure = f"Pass the file with the sha256 {recorded_digest}: --calibration FILE.safetensors (calibration=)"
        raise UsageError("the merge used another calibration file", path=given_calibration.path, cure=cure)
    return given_calibration


def _original(base: Dequantized, onto: Checkpoint) -> Original:
    if is_quantized(onto):
        raise Unsupported(
            f"the weights for --onto (onto=) are themselves quantized ({_kind(onto)})",
            path=onto.root,
            cure="Pass the folder of the 16-bit weights: --onto DIR (onto='DIR')",
        )
    _check_same(base.tensors, onto)
    values = {field.name: getattr(onto, field.name) for field in fields(Checkpoint)}
    return Original(**values, scheme=base.scheme, weights=len(base.packed))


def _check_same(tensors: Mapping[str, Lazy], onto: Checkpoint) -> None:
    """Check that the 16-bit weights have the same names and shapes as the dequantized base's weights."""
    cure = "Pass the folder of the weights from which the base was made: --onto DIR (onto='DIR')"
    for one, other, where in (
        (tensors, onto.tensors, "the 16-bit model"),
        (onto.tensors, tensors, "the quantized base"),
    ):
        lost = sorted(set(one) - set(other))
        if lost:
            raise TargetNotFound(f"{where} lacks {', '.join(lost[:3])}", path=onto.root, where=lost[0], cure=cure)
    for name, tensor in tensors.items():
        if onto.tensors[name].shape != tensor.shape:
            why = f"the shape is {list(onto.tensors[name].shape)}, but the base has {list(tensor.shape)}"
            raise ShapeMismatch(why, path=onto.root, where=name, cure=cure)


def config_changes(base: Checkpoint) -> dict[str, JsonValue]:
    """Return the keys to set in the output's `config.json` if the base is dequantized; None removes a key.

    Return an empty dict if the base has no quantization, or if the merged weights are quantized again.
    """
    if not isinstance(base, Dequantized) or base.packs:
        return {}
    text = (base.config or {}).get("text_config")
    nested = (base.stored.config or {}).get("text_config") != text
    return {"quantization_config": None, **({"text_config": text} if nested else {})}


def quantized_record(base: Checkpoint) -> dict[str, JsonValue] | None:
    """Return an entry for the output's record, as plain data. The entry states the choice for the quantized base.

    Return None if the base is not quantized.
    """
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
