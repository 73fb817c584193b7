"""Merge adapters into the weights of the layers that they name, and of no others.

A stored tensor may be shared with other layers, because it is tied or because the exporter stored equal tensors once.
Then it stays as it is for those, and the layer gets its own copy. Everything is computed in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..core.adapter import Adapter
from ..errors import NotMergeable, UsageError, places_errors
from ..io.checkpoint import opened as opened_base
from ..io.locations import path_text
from ..naming.binding import renamed
from .building import Building
from .changes import settle
from .checking import Outcome, checked_merge
from .folding import Fold, Folding
from .injecting import Report
from .model_file import Source as Opened
from .model_file import opened, placing, save_merged
from .reading import base_warnings, inputs_of, loaded, name_of
from .resolving import Found, resolve
from .saturation import clipping
from .tying import Tying
from .unpacking import CHOICES, as_float, is_packed

if TYPE_CHECKING:
    from .reading import Base, Model

    Source = Adapter | str | PathLike[str]


@places_errors
def merge(
    model: Model,
    adapters: Source | Sequence[Source],
    out: str | PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    base_weights: Base | None = None,
    quantized: str | None = None,
    tied: str | Mapping[str, str] | None = None,
    strict_base: bool = False,
    rename: str | Sequence[str] = (),
    check: bool | Mapping[str, Any] = True,
    overwrite: bool = True,
    made_from: str | None = None,
) -> Report:
    """Fold adapters into the weights of a graph: W' = W + sum_i weight_i * (f_i(W) - W), with one rounding.

    Args:
        model: an ONNX file or an in-memory model, which is not changed.
        adapters: one adapter or several: paths or `Adapter`s.
        out: the file to write. If the model has external data, the result gets one new data file beside it.
        weights: one factor per adapter; 1 for each if not given.
        base_weights: the weights that the graph was exported from, to find layers whose names are lost.
        quantized: for packed weights. `dequantize` folds into the dequantized numbers and writes a floating-point
            layer. `requantize` quantizes the result again in the same scheme; `Report.damage` has the error.
        tied: which layers an update changes if embedding and head have equal numbers, as in `adapterkit.merge`. By
            default, those that the tool which trained the adapter changed.
        strict_base: refuse a base whose name, config or fingerprint differs from the one that an adapter names, instead
            of a warning in the report.
        rename: rules for names that cannot be resolved, as in `adapterkit.merge`.
        check: run the result in onnxruntime and compare it with injected adapters; a mapping gives the inputs by name,
            True makes them up.
        overwrite: replace an existing `out`.
        made_from: a digest of everything that decides the output, stored with it for a later run.

    Raises:
        TargetNotFound: a target has no place in the graph, or several.
        ShapeMismatch: a shape does not fit.
        NotMergeable: an update does not change weights only.
        Unsupported: a weight is packed and `quantized` is not given, or its packing scheme is unknown.
        Malformed: the file is not a model, or a result does not fit its dtype.
        UsageError: nothing tells which of several tied layers an update changes.
        CheckFailed: the written graph computes something else, or `strict_base` is set and the base differs; nothing is
            left at `out`.
    """
    if quantized is not None and quantized not in CHOICES:
        raise UsageError(f"unknown choice {quantized!r}", where="quantized", cure=f"Known: {', '.join(CHOICES)}")
    source = opened(model)
    tying = _tying(source, base_weights, tied)
    read, factors, folds, wrong = _resolved(source.model, adapters, weights, base_weights, tying, strict_base, rename)
    building, damage = Building(source.model), dict[str, Mapping[str, float]]()
    changed = fold(folds, building, quantized, damage)
    building.settle()
    target, told = Path(path_text(out)), Outcome(None)
    several = [adapters] if isinstance(adapters, str | PathLike | Adapter) else adapters
    inputs = [file for one in several for file in inputs_of(one, base_weights)]
    with placing(target, source, inputs=inputs, overwrite=overwrite, made_from=made_from) as place:
        save_merged(source.model, source, place.path, changed)
        if check is not False:
            given = None if isinstance(check, bool) else check
            told = checked_merge(model, read, factors, base_weights, place.path, quantized, given, tying)
        warnings = (*wrong, *dict.fromkeys(tying.warnings), *clipping(told.saturation, source.model))
    found = tuple(found for found, _ in folds)
    return Report(
        target, place.files, found, told.difference, told.note, damage, told.reference, saturation=told.saturation,
        warnings=warnings,
    )  # fmt: skip


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
) -> tuple[Found, ...]:
    """Return where `merge` would fold adapters into a graph; writes nothing.

    Raises:
        TargetNotFound, ShapeMismatch, NotMergeable, Malformed, UsageError, CheckFailed: as `merge`.
    """
    source = opened(model)
    tying = _tying(source, base_weights, tied)
    folds = _resolved(source.model, adapters, weights, base_weights, tying, strict_base, rename)[2]
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
) -> tuple[list[Adapter], list[float], list[Fold], tuple[str, ...]]:
    """Return the adapters, their factors, the targets to fold into, and warnings about the base."""
    several = [adapters] if isinstance(adapters, str | PathLike | Adapter) else list(adapters)
    factors = [1.0] * len(several) if weights is None else [float(weight) for weight in weights]
    if not several or len(factors) != len(several) or not np.isfinite(factors).all():
        raise UsageError(f"{len(factors)} weights for {len(several)} adapters", cure="Give one number an adapter")
    folds: list[Fold] = []
    read: list[Adapter] = []
    named, base = [], None
    for adapter in several:
        known, base = loaded(adapter, base_weights)
        _refuse(known)
        read.append(known)
        named.append((name_of(adapter), known))
    read = renamed(read, rename)
    for known, factor in zip(read, factors, strict=True):
        folds += [(place, factor) for place in resolve(model, known, base, tying)]
    return read, factors, folds, base_warnings(named, base, strict_base)


def fold(
    folds: Sequence[Fold], building: Building, quantized: str | None = None,
    damage: dict[str, Mapping[str, float]] | None = None,
) -> list[ir.Value]:  # fmt: skip
    """Give every named layer its own changed weight and bias; return the new values, whose numbers are lazy.

    Args:
        folds: targets and factors.
        building: the model that is being changed.
        quantized: what to do with packed weights, one of `CHOICES`.
        damage: gets the error of each requantized weight, by target.
    """
    if quantized == "dequantize":
        floating = unpacked([place for place, _ in folds], building)
        folds = [(place, factor) for place, (_, factor) in zip(floating, folds, strict=True)]
    fresh: dict[tuple[Any, ...], ir.Value] = {}
    # All targets of a node are folded together, because its weight is rounded only once.
    by_spot: dict[Any, list[Fold]] = {}
    for place, factor in folds:
        for spot in dict.fromkeys(place.spots):
            by_spot.setdefault(spot, []).append((place, factor))
    for spot, at in by_spot.items():
        Folding(spot, at, building, fresh).done(quantized, damage)
    settle(fresh.values())
    return list(fresh.values())


def unpacked(found: Sequence[Found], building: Building) -> list[Found]:
    """Return the same targets with their packed layers converted to floating point."""
    made: dict[Any, ir.Value] = {}
    spots = {
        spot: as_float(spot, building, made) if is_packed(spot) else spot
        for spot in dict.fromkeys(spot for place in found for spot in place.spots)
    }
    return [replace(place, spots=tuple(spots[spot] for spot in place.spots)) for place in found]


def _refuse(adapter: Adapter) -> None:
    for target, update in adapter:
        if update.kind in ("output", "context"):
            why = f"{update.method} changes {update.acts_on}, not its weights"
            raise NotMergeable(why, where=str(target), cure="Inject it instead")
