"""Compare measured figures with thresholds, and describe the figures in plain sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .modules import UNCHANGED
from .result import AdapterEffect, GateCheck, KeptEffect, ModulePart, Thresholds

if TYPE_CHECKING:
    from collections.abc import Iterable

LEAST = 1e-9
"""If the effect is smaller than this, in nats per token, float32 is too coarse to measure the kept share."""

SHOWN = 3
"""The most modules that a sentence names."""

MOST = 0.9
"""A fault that at least this share of the modules has is reported once, for the whole model."""

EVERYWHERE = 0.5
"""If at least this share of the modules without adapters has wrong weights, the merge used another base."""

NAMES = {"merged": "the merged model", "onnx": "the graph"}


def checks_of(effect: AdapterEffect, kept: Sequence[KeptEffect], limits: Thresholds) -> list[GateCheck]:
    """Return the checks of the adapters and of each model."""
    found = [*_of_adapter(effect, limits)]
    for each in kept:
        found += _of_model(each, effect, limits)
    return found


def _of_adapter(effect: AdapterEffect, limits: Thresholds) -> Iterator[GateCheck]:
    if not effect.finite:
        yield GateCheck("finite", "adapter", False, None, None, "the base with the adapters gives NaN or infinities")
        return
    yield GateCheck("finite", "adapter", True, None, None, "all outputs of the base with the adapters are finite")
    text = f"the adapters move the output by {effect.divergence:.3g} {effect.unit}"
    ok = effect.divergence >= limits.min_effect
    yield GateCheck("effect", "adapter", ok, effect.divergence, limits.min_effect, text)
    if limits.min_over_null is not None:
        if effect.null is None:
            text = f"there is no null adapter to compare with: {effect.why_no_null}"
            yield GateCheck("over null", "adapter", None, None, limits.min_over_null, text)
        else:
            ratio = effect.divergence / effect.null if effect.null else float(effect.divergence > 0) * 1e9
            text = f"the effect is {ratio:.3g} times the effect of random changes of the same size"
            yield GateCheck("over null", "adapter", ratio >= limits.min_over_null, ratio, limits.min_over_null, text)


def _of_model(each: KeptEffect, effect: AdapterEffect, limits: Thresholds) -> Iterator[GateCheck]:
    name = NAMES[each.model]
    if each.why is not None:
        yield GateCheck("runs", each.model, False, None, None, f"{name} cannot be run: {each.why}")
        if not each.parts:
            return
    elif each.lacking:
        text = f"the files of {name} lack {_some(each.lacking)}"
        yield GateCheck("complete", each.model, False, float(len(each.lacking)), 0.0, text)
    ok: bool | None
    if each.why is None:
        ok = each.finite or not effect.finite
        text = f"{name} gives finite numbers" if each.finite else f"{name} gives NaN or infinities"
        yield GateCheck("finite", each.model, ok, None, None, text)
    if each.kept is not None and each.finite and effect.finite:
        known = effect.divergence >= LEAST
        text = f"{name} keeps {100 * each.kept:.4g} % of the effect" if known else "the effect is too small to measure"
        ok = each.kept >= limits.min_kept if known else None
        yield GateCheck("kept", each.model, ok, each.kept, limits.min_kept, text)
        if each.scale is not None:
            near = abs(each.scale - 1) <= limits.max_scale_error
            # Accept a wrong scale that rounding explains: in a correct merge, rounding to 16 bits can remove a tenth of
            # a small change. The check `kept` then decides whether too much of the effect is lost.
            rounded = not near and bool(ok) and not each.faults and any(part.rounded for part in each.parts)
            text = f"{name} contains {each.scale:.3g} times the change; 1 ± {limits.max_scale_error:.3g} passes"
            text += f"; {_rounding(each)} explains the difference" if rounded else ""
            yield GateCheck(
                "scale", each.model, (near or rounded) if known else None, each.scale, limits.max_scale_error, text
            )
    if each.parts:
        faults = each.faults
        text = f"{len(faults)} of {len(each.parts)} modules of {name} are wrong"
        yield GateCheck("modules", each.model, not faults, float(len(faults)), 0.0, text)
    if limits.min_agreement is not None and each.why is None:
        ok = None if each.agreement is None else each.agreement >= limits.min_agreement
        text = "share of greedily generated tokens that equal those of the base with the adapters"
        yield GateCheck("agreement", each.model, ok, each.agreement, limits.min_agreement, text)
    if limits.max_perplexity is not None and each.why is None:
        known = each.perplexity is not None and bool(effect.perplexity)
        ratio = each.perplexity / effect.perplexity if known else None  # type: ignore[operator]
        ok = None if ratio is None else ratio <= limits.max_perplexity
        text = "perplexity, relative to the base with the adapters"
        yield GateCheck("perplexity", each.model, ok, ratio, limits.max_perplexity, text)


def _rounding(each: KeptEffect) -> str:
    return "quantization" if each.dtype == "quantized" else f"rounding to {each.dtype}"


def verdicts_of(effect: AdapterEffect, kept: Sequence[KeptEffect], checks: Sequence[GateCheck]) -> tuple[str, ...]:
    """Return plain sentences about the result, faults first."""
    faults: list[str] = []
    notes: list[str] = []
    failed = {(check.model, check.name) for check in checks if check.ok is False}
    if not effect.finite:
        faults.append("the base with the adapters gives NaN or infinities: adapters or base are damaged")
    elif ("adapter", "effect") in failed:
        faults.append("the adapter changes nothing")
    else:
        text = f"the adapter moves the output by {effect.divergence:.3g} {effect.unit}"
        if effect.null:
            ratio = effect.divergence / effect.null
            text += f", {ratio:.3g} times as far as random changes of the same size"
        notes.append(text)
    for each in kept:
        of_model = [*_faults(each, failed)]
        faults += of_model
        if not of_model and each.kept is not None:
            notes.append(f"{NAMES[each.model]} keeps {100 * min(each.kept, 1.0):.4g} % of the effect")
        below = sum(part.rounded for part in each.parts)
        if below:
            notes.append(f"at {below} modules {_rounding(each)} explains the difference")
    faults += [check.text for check in checks if check.ok is False and check.name in ("over null",)]
    return tuple(dict.fromkeys([*faults, *notes]))


def _faults(each: KeptEffect, failed: set[tuple[str, str]]) -> Iterator[str]:
    name = NAMES[each.model]
    if each.why is not None:
        yield f"{name} cannot be run: {each.why}"
    if each.lacking:
        yield f"the files of {name} lack {_some(each.lacking)}, so transformers initializes these weights at random"
    if not each.finite:
        where = next((part.module for part in each.parts if "not finite" in part.fault), None)
        yield f"{name} gives NaN or infinities" + (f", first at {shortened(where)}" if where else "")
    yield from _by_modules(each, name)
    if each.faults:
        yield f"{shortened(each.faults[0].module)} is the first module that differs"
        return
    if (each.model, "scale") in failed and each.scale is not None:
        yield _scaled(name, each.scale)
    elif (each.model, "kept") in failed and each.kept is not None:
        if each.dtype == "quantized" or any(part.rounded for part in each.parts):
            yield f"rounding has removed the change: {name} keeps {max(0.0, 100 * each.kept):.3g} % of the effect"
        else:
            yield f"{name} is wrong: it keeps {100 * each.kept:.3g} % of the effect"
    for check in ("agreement", "perplexity"):
        if (each.model, check) in failed:
            yield f"{name} misses the threshold for {check}"


def _scaled(name: str, scale: float) -> str:
    if abs(scale) < UNCHANGED:
        return f"{name} equals the base: it contains nothing of the change"
    if scale < 0:
        return f"{name} contains the change with the opposite sign (scale x {scale:.2g})"
    word = {2: "twice the change", 0.5: "half the change"}.get(round(scale, 1), f"{scale:.2g} times the change")
    return f"{name} contains {word} (scale x {scale:.2g})"


def _by_modules(each: KeptEffect, name: str) -> Iterator[str]:
    """Yield a sentence for each kind of fault, or one sentence for the model if most modules have the same fault."""
    touched = [part for part in each.parts if part.touched]
    broken = [part for part in touched if part.fault]
    other = [part for part in each.parts if not part.touched and "other weights" in part.fault]
    alone = [part for part in each.parts if not part.touched]
    elsewhere = len(other) >= EVERYWHERE * len(alone) and len(other) > 1
    if elsewhere and (len(broken) >= EVERYWHERE * len(touched)):
        yield f"{name} was made from other weights than the base"
        return
    scales = [part.scale for part in broken if part.scale is not None and _is_multiple(part)]
    if touched and len(scales) >= MOST * len(touched) and max(scales) - min(scales) < 2 * UNCHANGED:
        mean = sum(scales) / len(scales)
        # Prefer the scale measured across all modules. The plain mean counts weak changes as much as strong ones,
        # although rounding distorts weak changes most.
        known = each.scale is not None and abs(each.scale - mean) < UNCHANGED
        yield _scaled(name, each.scale if known else mean)  # type: ignore[arg-type]
        broken = [part for part in broken if not _is_multiple(part)]
    kinds: dict[str, list[ModulePart]] = {}
    for part in [*broken, *(part for part in alone if part.fault)]:
        if "not finite" not in part.fault:
            kinds.setdefault(_kind(part), []).append(part)
    for kind, parts in kinds.items():
        modules = [shortened(part.module) for part in parts]
        count = f"{len(parts)} of {len(each.parts)} modules: " if len(parts) > 1 else ""
        yield f"{count}{_some(modules)} {_plural(kind) if len(parts) > 1 else parts[0].fault}"


def _is_multiple(part: ModulePart) -> bool:
    return "nothing of the change" in part.fault or "times the change" in part.fault or "opposite sign" in part.fault


def _kind(part: ModulePart) -> str:
    """Return a fault without its numbers and names, so that similar faults can be grouped."""
    if part.fault.startswith("contains the change of "):
        return "contains the change of another module"
    return "contains another multiple of the change" if "times the change" in part.fault else part.fault


def _plural(fault: str) -> str:
    """Return a fault with its verb in the plural."""
    verb, _, rest = fault.partition(" ")
    verbs = {"is": "are", "has": "have", "contains": "contain", "gives": "give", "computes": "compute"}
    return f"{verbs.get(verb, verb)} {rest}"


def shortened(module: str) -> str:
    """Return a short name of a module: `layer 3 down_proj` for `model.layers.3.mlp.down_proj`."""
    found = re.search(r"(?:^|\.)(?:layers?|h|blocks?|encoder\.layer)\.(\d+)\.(?:.*\.)?([^.]+)$", module)
    if found is None:
        return module or "the model"
    last = found[2] if found[2] not in ("dense", "LayerNorm") else ".".join(module.split(".")[-2:])
    return f"layer {found[1]} {last}"


def _some(names: Iterable[str]) -> str:
    listed = [*names]
    more = len(listed) - SHOWN
    return ", ".join(listed[:SHOWN]) + (f" and {more} more" if more > 0 else "")
