"""The result of a gate: metrics, checks of the metrics against thresholds, and plain sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..core.tables import html_table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..io.strict_json import JsonValue

OUTCOMES = ("passed", "failed", "inconclusive")


UNCHANGED = 0.1
"""If a weight contains less than this share of the adapters' change, the weight counts as unchanged."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The thresholds of a gate. If a threshold is None, the gate omits the check that uses this threshold.

    Attributes:
        min_effect: the minimum of KL(base || base with adapters), in nats per token.
        min_kept: the minimum share of the effect that a merged model or graph keeps.
        max_scale_error: the maximum of `|1 - scale|`. The merged model or graph contains `scale` times the adapters'
            change.
        max_part_error: the maximum error of a module's change, relative to the change; rounding errors are not counted.
        min_agreement: the minimum of `KeptEffect.agreement`.
        max_perplexity: the maximum perplexity, relative to the perplexity of the base with adapters.
        min_over_null: the minimum effect, relative to the effect of the null adapter.
    """

    min_effect: float = 1e-6
    min_kept: float = 0.9
    max_scale_error: float = 0.1
    max_part_error: float = 0.3
    min_agreement: float | None = None
    max_perplexity: float | None = None
    min_over_null: float | None = None


@dataclass(frozen=True, slots=True)
class GateCheck:
    """The comparison of a measured value with its threshold.

    Attributes:
        name: the name of the check, such as `kept` or `scale`.
        model: the model to which the check applies: `adapter` (the base with adapters), `merged` or `onnx`.
        ok: whether the check passed; None if the check is undecided, for example because nothing was measured.
        value: the measured value; None if the check has no value, or if nothing was measured.
        limit: the threshold; None if the check has no threshold.
        text: an explanation of the result.
    """

    name: str
    model: str
    ok: bool | None
    value: float | None
    limit: float | None
    text: str


@dataclass(frozen=True, slots=True)
class AdapterEffect:
    """The effect of adapters on a base.

    Attributes:
        divergence: KL(base || base with adapters) in nats per token or input. For models without logits,
            `|adapted - base|^2 / |base|^2`, computed from the hidden states.
        unit: the text that is printed after `divergence` to name its unit, such as `nats per token`.
        null: the divergence between the base and the base with the null adapter, in the same unit. The null adapter
            makes a random change at each target, with the same norm as the adapters' change. None if not measured.
        why_no_null: the reason why `null` was not measured; None if `null` was measured.
        agreement: the base generates texts greedily, once without and once with the adapters. `agreement` is the share
            of tokens that come before the first difference between the two texts. None if no text was generated.
        perplexity_base: the perplexity of the base; None for models that do not predict the next token.
        perplexity: the perplexity of the base with adapters; None for models that do not predict the next token.
        finite: whether all outputs of the base with adapters are finite.
    """

    divergence: float
    unit: str
    null: float | None
    why_no_null: str | None
    agreement: float | None
    perplexity_base: float | None
    perplexity: float | None
    finite: bool


@dataclass(frozen=True, slots=True)
class ModulePart:
    """How one module of a merged model differs from the same module of the base with adapters, on the same input.

    Attributes:
        module: the name of the module.
        touched: whether the adapters change the module.
        scale: the factor by which the merged model scales the adapters' change of this module: 1 in a correct merge, 0
            if the change is missing. None if `touched` is False or the scale was not measured.
        error: the norm of the error, divided by the norm of the adapters' change; if `touched` is False, divided by the
            norm of the output.
        finite: False if, for some input, the output of the merged model has NaN or infinities, but the output of the
            base with adapters is finite.
        fault: a phrase that describes the fault; empty if the module is right.
        rounded: whether rounding to the merged model's dtype explains the difference.
    """

    module: str
    touched: bool
    scale: float | None
    error: float
    finite: bool
    fault: str = ""
    rounded: bool = False


@dataclass(frozen=True, slots=True)
class BlockDifference:
    """The difference of the hidden states after one block.

    The hidden states are those of the base (`base`), the base with adapters (`adapted`) and the merged model
    (`merged`).

    Attributes:
        block: the index in the list of hidden states. 0 is the embedding's output, and n is the output of the nth
            block. In an encoder-decoder model, the decoder's hidden states follow the encoder's.
        difference: `|merged - adapted| / |adapted|`.
        change: `|adapted - base| / |adapted|`.
    """

    block: int
    difference: float
    change: float


@dataclass(frozen=True, slots=True)
class KeptEffect:
    """The share of the adapters' effect that a merged model or a graph keeps. A metric is None if it was not measured.

    Attributes:
        model: `merged` or `onnx`.
        path: the path of the model or graph.
        divergence: KL(base with adapters || this model) in nats per token or input. For models without logits,
            `|adapted - this|^2 / |adapted|^2`, computed from the hidden states.
        kept: `1 - divergence / d`, where `d` is the divergence between the base with adapters and the base.
        scale: the factor by which this model scales the adapters' change: 1 in a correct merge, 0 in the base.
        agreement: this model and the base with adapters generate texts greedily. `agreement` is the share of tokens
            that come before the first difference between the two texts.
        perplexity: the perplexity of this model.
        finite: whether all outputs are finite.
        dtype: the dtype that stores most of the weights' elements, or `quantized`; None for a graph.
        parts: the comparison of each module, in the order in which the modules run. Modules that did not run are last.
            Empty for a graph.
        blocks: the difference of the hidden states after each block; empty for a graph.
        lacking: names of weights that the model has but the files lack.
        why: the reason why the model could not be run; None if it ran.
    """

    model: str
    path: str
    divergence: float | None = None
    kept: float | None = None
    scale: float | None = None
    agreement: float | None = None
    perplexity: float | None = None
    finite: bool = True
    dtype: str | None = None
    parts: tuple[ModulePart, ...] = ()
    blocks: tuple[BlockDifference, ...] = ()
    lacking: tuple[str, ...] = ()
    why: str | None = None

    @property
    def faults(self) -> tuple[ModulePart, ...]:
        """Modules with a fault, in the order in which they run."""
        return tuple(part for part in self.parts if part.fault)

    @property
    def parted(self) -> str | None:
        """The name of the first module with a fault; None if no module has a fault."""
        return self.faults[0].module if self.faults else None


@dataclass(frozen=True, slots=True)
class Gate:
    """The result of a gate.

    Attributes:
        base: the name of the base.
        adapters: the names of the adapters.
        data: a description of the inputs, such as `8 built-in texts`.
        device: the device on which the models ran.
        dtype: the dtype in which the models ran.
        seed: the seed of all random choices.
        effect: the effect of the adapters on the base.
        kept: how much of the effect the merged model and the graph keep; one entry for each of them that was passed.
        checks: the comparisons with thresholds.
        verdicts: plain sentences about the result, faults first.
        seconds: the duration of the gate, in seconds.
        warnings: warnings about adapters whose files record another base.
    """

    base: str
    adapters: tuple[str, ...]
    data: str
    device: str
    dtype: str
    seed: int
    effect: AdapterEffect
    kept: tuple[KeptEffect, ...]
    checks: tuple[GateCheck, ...]
    verdicts: tuple[str, ...]
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()

    @property
    def outcome(self) -> str:
        """`failed` if a check failed; otherwise, `inconclusive` if a check is undecided; otherwise, `passed`."""
        if any(check.ok is False for check in self.checks):
            return "failed"
        return "inconclusive" if any(check.ok is None for check in self.checks) else "passed"

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return self.outcome == "passed"

    @property
    def merged(self) -> KeptEffect | None:
        """The metrics of the merged model; None if the caller gave no merged model."""
        return next((each for each in self.kept if each.model == "merged"), None)

    @property
    def onnx(self) -> KeptEffect | None:
        """The metrics of the ONNX graph; None if the caller gave no graph."""
        return next((each for each in self.kept if each.model == "onnx"), None)

    def __repr__(self) -> str:
        failed = [f"{check.model} {check.name}" for check in self.checks if check.ok is False]
        failures = f": {', '.join(failed)}" if failed else ""
        return f"Gate({self.outcome}{failures}; {len(self.checks)} checks)"

    def _repr_html_(self) -> str:
        words = {True: "passed", False: "failed", None: "undecided"}
        rows = [[c.model, c.name, words[c.ok], c.value, c.limit, c.text] for c in self.checks]
        return html_table(repr(self), ("model", "check", "result", "value", "limit", "explanation"), rows)

    def record(self) -> dict[str, JsonValue]:
        """Return the result as a dict of JSON values."""
        return {
            "kind": "gate", "outcome": self.outcome, "ok": self.ok, "base": self.base, "adapters": list(self.adapters),
            "data": self.data, "device": self.device, "dtype": self.dtype, "seed": self.seed,
            "effect": asdict(self.effect), "checks": [asdict(check) for check in self.checks],
            "kept": [{**asdict(each), "parted": each.parted} for each in self.kept], "verdicts": list(self.verdicts),
            "warnings": list(self.warnings), "seconds": round(self.seconds, 3),
        }  # fmt: skip


# Compare metrics with thresholds, and describe the metrics in plain sentences.


LEAST = 1e-9
"""Below this effect, in nats per token, the checks `kept` and `scale` are undecided, because float32 is too coarse."""

SHOWN = 3
"""The maximum number of modules that a sentence names."""

MOST = 0.9
"""If at least this share of the modules with adapters contains about the same wrong multiple of the change, report the
fault once, for the whole model."""

EVERYWHERE = 0.5
"""If at least this share of the modules is wrong, the gate reports that the merge was made from another base.

Two conditions must hold. First, at least this share of the modules that the adapters do not change, and at least two
of these modules, have other weights than the base. Second, at least this share of the modules that the adapters change
has a fault.
"""

NAMES = {"merged": "the merged model", "onnx": "the graph"}


def checks_of(effect: AdapterEffect, kept: Sequence[KeptEffect], limits: Thresholds) -> list[GateCheck]:
    """Return the checks of the adapters' effect, and the checks of the merged model and the graph."""
    checks = [*_of_adapter(effect, limits)]
    for each in kept:
        checks += _of_model(each, effect, limits)
    return checks


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
            # Even in a correct merge, rounding to 16 bits can remove a tenth of a small change. So accept a wrong scale
            # that rounding explains. The check `kept` decides whether too much of the effect is lost.
            rounded = not near and bool(ok) and not each.faults and any(part.rounded for part in each.parts)
            text = f"{name} contains {each.scale:.3g} times the change; allowed: 1 ± {limits.max_scale_error:.3g}"
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
        faults.append("the base with the adapters gives NaN or infinities: the adapters or the base are damaged")
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
            notes.append(f"{_rounding(each)} explains the difference at {below} modules")
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
            yield f"{name} fails the {check} check"


def _scaled(name: str, scale: float) -> str:
    if abs(scale) < UNCHANGED:
        return f"{name} equals the base: it contains none of the change"
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
        # Prefer `each.scale`, a mean weighted by the size of the changes. The plain mean gives weak changes the same
        # weight as strong changes, although rounding distorts weak changes most.
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
    return "none of the change" in part.fault or "times the change" in part.fault or "opposite sign" in part.fault


def _kind(part: ModulePart) -> str:
    """Return the kind of a module's fault, without the factor of a multiple or the name of another module."""
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
    match = re.search(r"(?:^|\.)(?:layers?|h|blocks?|encoder\.layer)\.(\d+)\.(?:.*\.)?([^.]+)$", module)
    if match is None:
        return module or "the model"
    last = match[2] if match[2] not in ("dense", "LayerNorm") else ".".join(module.split(".")[-2:])
    return f"layer {match[1]} {last}"


def _some(names: Iterable[str]) -> str:
    listed = [*names]
    more = len(listed) - SHOWN
    return ", ".join(listed[:SHOWN]) + (f" and {more} more" if more > 0 else "")
