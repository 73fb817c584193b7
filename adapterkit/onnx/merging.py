"""Merging into graphs: adapters folded into the weights of the layers that they name, and into no other's.

A stored tensor that other layers read too, because it is tied or because an exporter stored equal ones once, stays as
it is for those: the layer gets its own. Everything is computed in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..adapter import Adapter
from ..binding import renamed
from ..errors import NotMergeable, UsageError, places_errors
from ..tensors.checkpoint import opened as opened_base
from ..tensors.locations import path_text
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
    """Folds adapters into the weights of a graph: W' = W + sum_i weight_i * (f_i(W) - W), rounded once.

    Args:
        model: an ONNX file, or a model in memory, which stays as it is.
        adapters: one adapter or several: paths or `Adapter`s.
        out: the file to write. A model with numbers in data files gets one new data file beside it.
        weights: one factor an adapter; 1 for each when not given.
        base_weights: the weights that the graph was exported from: finds layers whose names are lost.
        quantized: where a weight is packed, `dequantize`: fold into the dequantized numbers and write a layer of
            floating point; `requantize`: quantize the result again in the same scheme; `Report.damage` tells what that
            did.
        tied: which layers an update changes where embedding and head have equal numbers, as in `adapterkit.merge`. When
            not given, those that the tool which trained the adapter changed.
        strict_base: refuse a base whose name, config or fingerprint is not the one that an adapter names, instead of
            a warning in the report.
        rename: rules for names that cannot be told, as in `adapterkit.merge`.
        check: run the result with onnxruntime against the model with the adapters injected; on these inputs, by name,
            or on inputs that are made up.
        overwrite: replace what is at `out`; False refuses where something is there.
        made_from: a digest of what decides the output, kept with it for a later run.

    Raises:
        TargetNotFound: a target has no place in the graph, or several.
        ShapeMismatch: a shape does not fit.
        NotMergeable: an update's law is not one of weights.
        Unsupported: a weight is packed and `quantized` does not say what to do, or in a way that is not known here.
        Malformed: the file is no model, or a result does not fit its type.
        UsageError: nothing tells which of several tied layers an update changes.
        CheckFailed: the written graph computes something else, or the base is not the one that an adapter names and
            `strict_base`; nothing is left at `out`.
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
    """Where `merge` would fold adapters into a graph; nothing is written.

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
    """The adapters, their weights, where they go, and what is wrong about the base."""
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
    """Gives every layer that is named its own changed weight and bias; returns the new values, their numbers lazy.

    Args:
        folds: what changes, and by how much.
        building: the model that is being changed.
        quantized: what to do with packed weights, one of `CHOICES`.
        damage: gets what packing a weight again did to it, by target.
    """
    if quantized == "dequantize":
        floating = unpacked([place for place, _ in folds], building)
        folds = [(place, factor) for place, (_, factor) in zip(floating, folds, strict=True)]
    fresh: dict[tuple[Any, ...], ir.Value] = {}
    by_spot: dict[Any, list[Fold]] = {}
    for place, factor in folds:
        for spot in dict.fromkeys(place.spots):
            by_spot.setdefault(spot, []).append((place, factor))
    for spot, at in by_spot.items():
        Folding(spot, at, building, fresh).done(quantized, damage)
    settle(fresh.values())
    return list(fresh.values())


def unpacked(found: Sequence[Found], building: Building) -> list[Found]:
    """The same targets, their packed layers made ones of floating point."""
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
