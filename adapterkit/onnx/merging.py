"""Merge adapters into the weights of the layers that they name; all other layers keep their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ..core.adapter import Adapter
from ..core.arguments import checks_types, weights_of
from ..errors import PASS_AN_ADAPTER, NotMergeable, UsageError, places_errors
from ..io.checkpoint import opened as opened_base
from ..io.locations import path_text
from ..naming.binding import renamed
from .attaching import attach
from .building import Building
from .checking import CheckOutcome, checked_merge, refuse_invalid
from .conversion import inlined_note
from .folders import folder_of, graphs_in, left_out, merge_folder, only_graph, plan_folder
from .folding import PlannedUpdate, fold
from .injecting import MERGED, ORIGINAL
from .model_file import GraphSource as Opened
from .model_file import opened, placing, save_merged
from .packed import CHOICES, KEEPING
from .reading import base_warnings, inputs_of, loaded, name_of
from .report import GraphReport
from .resolved import ResolvedTarget
from .resolving import resolve
from .saturation import clipping
from .tying import Tying

if TYPE_CHECKING:
    from .reading import Base, Model, Source
    from .trial_inputs import Feeds


@checks_types
@places_errors
def merge(
    model: Model,
    adapters: Source | Sequence[Source],
    out: str | PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    base_weights: Base | None = None,
    quantized: str | None = None,
    keep_change: str | None = None,
    tied: str | Mapping[str, str] | None = None,
    strict_base: bool = False,
    rename: str | Sequence[str] = (),
    allow_partial: bool = False,
    check: bool | Feeds = True,
    overwrite: bool = True,
    made_from: str | None = None,
) -> GraphReport:
    """Fold adapters into the weights of a graph: `W' = W + sum_i weight_i * (f_i(W) - W)`, rounded once.

    `f_i(W)` is the weight that adapter i gives if it is merged alone.

    Args:
        model: an ONNX file, an in-memory model, or a folder of graphs that make up one model, such as encoder and
            decoders. The model is not changed.
        adapters: one adapter or several: paths or `Adapter`s.
        out: the file to write. If the model has external data, the result gets one new data file beside it. If the
            model is a folder, this is the folder to write: each graph gets the updates of its own targets, and all
            other files are copied.
        weights: one factor per adapter; each is 1 by default.
        base_weights: the weights of the model that the graph was exported from. With them, layers are also found if the
            graph has lost their names.
        quantized: how to merge into packed weights. `dequantize` adds the change to the dequantized weight and writes
            a floating-point layer. `requantize` quantizes the merged weight again in the same scheme;
            `GraphReport.damage` stores the error of this quantization.
        keep_change: how to store the change of a packed weight. `float` keeps the weight unchanged and attaches the
            change beside it, as floating-point factors. `packed` quantizes the changed weight again, even if most of
            the change is lost. By default, with `quantized="requantize"`, a change is attached beside the weight if
            quantizing again would lose more than 5 % of the change. `GraphReport.beside` names the targets of such
            changes.
        tied: which layers an update changes if the embedding and the head have equal weights, as in `adapterkit.merge`.
            By default, an update changes the same layers as in the tool that trained the adapter.
        strict_base: refuse a base if its name, config or fingerprint differs from the base that an adapter names. By
            default, such a difference only adds a warning to the report.
        rename: rules for names that cannot be resolved, as in `adapterkit.merge`.
        allow_partial: omit targets that the graph lacks; the graph must have at least one target of each adapter.
        check: run the result in onnxruntime and compare it with injected adapters. A mapping gives the inputs by name;
            True uses generated inputs.
        overwrite: replace an existing `out`.
        made_from: a digest of everything that determines the output, stored with the output for later runs.

    Raises:
        TargetNotFound: the graph has no layer for a target, or several that cannot be distinguished.
        ShapeMismatch: the shape of a tensor does not fit its layer.
        NotMergeable: an update changes something other than weights.
        Unsupported: a weight is packed and neither `quantized` nor `keep_change` is given; its packing scheme is
            unknown; or the change cannot be attached beside the weight.
        Malformed: the file is not a model; it is so invalid that onnxruntime does not load it; or a merged value does
            not fit its dtype.
        UsageError: layers are tied, and neither the adapter nor `tied` shows which of these layers an update changes.
        CheckFailed: the written graph does not compute what injected adapters compute, or `strict_base` is set and the
            base differs. No file is left at `out`.
    """
    if quantized is not None and quantized not in CHOICES:
        raise UsageError(f"unknown choice {quantized!r}", where="quantized", cure=f"Known: {', '.join(CHOICES)}")
    if keep_change is not None and keep_change not in KEEPING:
        raise UsageError(f"unknown choice {keep_change!r}", where="keep_change", cure=f"Known: {', '.join(KEEPING)}")
    if keep_change is not None and quantized != ("requantize" if keep_change == "packed" else quantized):
        cure = "Also pass --quantized requantize (quantized='requantize')"
        raise UsageError("the choice 'packed' requires that weights are requantized", where="keep_change", cure=cure)
    if keep_change == "float" and quantized == "dequantize":
        cure = "Omit either --keep-change (keep_change=) or --quantized (quantized=)"
        raise UsageError(
            "the choice 'float' has no effect on dequantized weights, because they get the whole change",
            where="keep_change",
            cure=cure,
        )
    several = [adapters] if isinstance(adapters, str | PathLike | Adapter) else list(adapters)
    if (folder := folder_of(model, out)) is not None:
        return merge_folder(
            merge, folder, several, out, weights=weights, base_weights=base_weights, quantized=quantized,
            keep_change=keep_change, tied=tied,
            strict_base=strict_base, rename=rename, allow_partial=allow_partial, check=check, overwrite=overwrite,
            made_from=made_from,
        )  # fmt: skip
    source = opened(only_graph(model))
    tying = _tying(source, base_weights, tied)
    read, factors, folds, wrong = _resolved(
        source.model, several, weights, base_weights, tying, strict_base, rename, allow_partial
    )
    building, damage = Building(source.model), dict[str, Mapping[str, float]]()
    beside: list[ResolvedTarget] = []
    changed = fold(folds, building, quantized, damage, keep_change, beside)
    attach(beside, building)
    building.settle()
    if ORIGINAL in source.model.metadata_props:
        source.model.metadata_props[ORIGINAL] = MERGED
    target, outcome = Path(path_text(out)), CheckOutcome(None)
    inputs = [file for one in several for file in inputs_of(one, base_weights)]
    with placing(target, source, inputs=inputs, overwrite=overwrite, made_from=made_from) as place:
        save_merged(source.model, source, place.path, changed)
        if check is not False:
            given = None if isinstance(check, bool) else check
            options: dict[str, Any] = {"given": given, "tying": tying, "beside": beside}
            outcome = checked_merge(model, read, factors, base_weights, place.path, quantized, **options)
            if outcome.difference is None:
                refuse_invalid(opened(model))
        warnings = (*wrong, *dict.fromkeys(tying.warnings), *clipping(outcome.saturation, source.model))
    places = tuple(place for place, _ in folds)
    note = "; ".join(filter(None, [inlined_note(source.model), outcome.note])) or None
    return GraphReport(
        target, place.files, places, outcome.difference, note, damage, outcome.reference,
        saturation=outcome.saturation, warnings=warnings, beside=tuple(dict.fromkeys(str(at.asked) for at in beside)),
    )  # fmt: skip


@checks_types
@places_errors
def plan(
    model: Model,
    adapters: Source | Sequence[Source],
    *,
    weights: Sequence[float] | None = None,
    base_weights: Base | None = None,
    tied: str | Mapping[str, str] | None = None,
    strict_base: bool = False,
    rename: str | Sequence[str] = (),
    allow_partial: bool = False,
) -> tuple[ResolvedTarget, ...]:
    """Return the targets into which `merge` would fold the adapters; write nothing. The arguments are as in `merge`.

    Raises:
        TargetNotFound, ShapeMismatch, NotMergeable, Malformed, UsageError, CheckFailed: as in `merge`.
    """
    if (folder := folder_of(model, "")) is not None and len(graphs_in(folder)) > 1:
        return plan_folder(
            plan, folder, adapters, weights=weights, rename=rename, allow_partial=allow_partial,
            base_weights=base_weights, tied=tied, strict_base=strict_base,
        )  # fmt: skip
    source = opened(only_graph(model))
    tying = _tying(source, base_weights, tied)
    folds = _resolved(source.model, adapters, weights, base_weights, tying, strict_base, rename, allow_partial)[2]
    return tuple(place for place, _ in folds)


def _tying(source: Opened, base_weights: Base | None, tied: str | Mapping[str, str] | None) -> Tying:
    return Tying.of(None if base_weights is None else opened_base(base_weights), source.path, tied)


def _resolved(
    model: ir.Model,
    adapters: Source | Sequence[Source],
    weights: Sequence[float] | None,
    base_weights: Base | None,
    tying: Tying,
    strict_base: bool,
    rename: str | Sequence[str],
    allow_partial: bool,
) -> tuple[list[Adapter], list[float], list[PlannedUpdate], tuple[str, ...]]:
    """Return the adapters, their factors, the updates to fold at each target, and warnings."""
    several = [adapters] if isinstance(adapters, str | PathLike | Adapter) else list(adapters)
    if not several:
        raise UsageError("no adapter was given", cure=PASS_AN_ADAPTER)
    factors = weights_of(weights, len(several))
    folds: list[PlannedUpdate] = []
    read: list[Adapter] = []
    named, base = [], None
    for adapter in several:
        known, base = loaded(adapter, base_weights)
        _refuse(known)
        read.append(known)
        named.append((name_of(adapter), known))
    read = renamed(read, rename)
    warnings = base_warnings(named, base, strict_base)
    if allow_partial:
        split = [left_out(model, known, base, tying) for known in read]
        read, warnings = [kept for kept, _ in split], (*warnings, *(line for _, lines in split for line in lines))
    for known, factor in zip(read, factors, strict=True):
        folds += [(place, factor) for place in resolve(model, known, base, tying)]
    return read, factors, folds, warnings


def _refuse(adapter: Adapter) -> None:
    for target, update in adapter:
        if update.kind in ("output", "context"):
            why = f"{update.method} changes {update.acts_on}, not its weights"
            raise NotMergeable(why, where=str(target), cure="Inject the adapter instead of merging it")
