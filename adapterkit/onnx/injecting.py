"""Injection into graphs: an adapter becomes nodes beside the layers it adapts; the model's own numbers stay."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ..adapter import Adapter
from ..binding import renamed
from ..errors import Corrupt, Malformed, Unsupported, UsageError, places_errors, storage_error
from ..tensors.atomic import write_bytes
from ..tensors.locations import path_text
from .attaching import attach
from .building import Building
from .calls import Words
from .checking import Outcome, checked_injection
from .contexts import of_attention, parted, place
from .experts import with_experts
from .fitting import write_adapter
from .model_file import Source, opened, placing, save
from .reading import base_warnings, inputs_of, loaded, name_of
from .resolving import Found, resolve
from .saturation import Saturation, clipping
from .shadows import config_of
from .tying import Tying

if TYPE_CHECKING:
    from .reading import Base, Model

ORIGINAL = "adapterkit.original"
"""The metadata key under which a rewritten model keeps what it takes to have the first one back."""

MODES = ("constant", "slots")


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """What was done to a graph.

    Attributes:
        out: the model that was written.
        files: every file that was written.
        found: where each target was.
        difference: what the check found; None where it was not asked for or could not be made.
        note: why the check could not be made; of context, how it is used.
        damage: of each target whose weight was quantized again, what that did to it: `error`, relative to the merged
            weight, and `kept`, the part of the change that is left.
        reference: the largest difference of ONNX's reference implementation from onnxruntime on what was written; None
            where it did not run, as of operators that are not ONNX's own.
        saturation: of a graph with static quantization, how many values it clips without and with the adapter; None
            where the check did not run.
        warnings: what the user should know, each with what to do about it.
    """

    out: Path
    files: tuple[Path, ...]
    found: tuple[Found, ...]
    difference: float | None = None
    note: str | None = None
    damage: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    reference: float | None = None
    saturation: Saturation | None = None
    warnings: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "out": str(self.out), "files": [file.name for file in self.files],
            "targets": [place.record() for place in self.found], "difference": self.difference, "note": self.note,
            "reference": self.reference, "warnings": list(self.warnings),
            **({"saturation": self.saturation.record()} if self.saturation else {}),
            **({"damage": dict(self.damage)} if self.damage else {}),
        }  # fmt: skip


@places_errors
def inject(
    model: Model,
    adapter: Adapter | str | PathLike[str],
    out: str | PathLike[str],
    *,
    mode: str = "constant",
    base_weights: Base | None = None,
    call: Mapping[str, Any] | None = None,
    experts: Sequence[Adapter | str | PathLike[str]] = (),
    tied: str | Mapping[str, str] | None = None,
    strict_base: bool = False,
    rename: str | Sequence[str] = (),
    check: bool | Mapping[str, Any] = True,
    overwrite: bool = True,
    made_from: str | None = None,
) -> Report:
    """Attaches an adapter to a graph: at each target it computes what the adapter's formulas say.

    Args:
        model: an ONNX file, or a model in memory, which stays as it is.
        adapter: the adapter, or its path.
        out: the file to write. Numbers that the model keeps in data files stay there, and are copied only where
            `out` is in another folder.
        mode: `constant` writes the adapter into the graph. `slots` makes its tensors inputs that may be left out, and
            writes the adapter itself beside `out`, with the suffix `.onnx_adapter`, for `Session` and onnxruntime.
        base_weights: the weights that the graph was exported from: finds layers whose names are lost. A network beside
            the model is made by the `config.json` there, or by that beside the graph.
        call: what a law asks of the model's call where it is no input of the graph under that name: the name of a
            value of the graph. `{"task_ids": 1}` fixes the task of all rows, which else becomes an input;
            `{"hidden_states": "NAME"}` is the value that the last layer gives.
        experts: adapters that a router's file names but does not hold (Arrow, X-LoRA), in the router's order.
        tied: which layers an update changes where embedding and head have equal numbers, as in `adapterkit.merge`. When
            not given, those that the tool which trained the adapter changed.
        strict_base: refuse a base whose name, config or fingerprint is not the one that the adapter names, instead of
            a warning in the report.
        rename: rules for names that cannot be told, as in `adapterkit.merge`.
        check: run the result with onnxruntime against the model with merged weights; on these inputs, by name, or on
            inputs that are made up.
        overwrite: replace what is at `out`; False refuses where something is there.
        made_from: a digest of what decides the output, kept with it for a later run.

    Raises:
        TargetNotFound: a target has no place in the graph, or several.
        ShapeMismatch: a shape does not fit.
        Unsupported: a layer cannot take the method.
        Malformed: the file is no model, or its data is missing, too short or outside its folder.
        UsageError: nothing tells which of several tied layers an update changes.
        CheckFailed: the written graph computes something else, or the base is not the one that the adapter names and
            `strict_base`; nothing is left at `out`.
    """
    if mode not in MODES:
        raise UsageError(f"unknown mode {mode!r}", where="mode", cure=f"Known: {', '.join(MODES)}")
    source = opened(model)
    read, base = loaded(adapter, base_weights)
    wrong = base_warnings([(name_of(adapter), read)], base, strict_base)
    tying = Tying.of(base, source.path, tied)
    read = with_experts(read, [loaded(expert, None)[0] for expert in experts])
    (read,) = renamed([read], rename)
    rest, context = parted(read)
    if context and mode == "slots":
        cure = "Inject it as constants: a run without its tokens, or with a past, is the base's"
        raise Unsupported("slots for context", where=str(context[0][0]), cure=cure)
    building = Building(source.model)
    used = place(context, building)
    found = resolve(source.model, rest, base, tying)
    slots = _slots(mode, building)
    words = Words(building, [update for _, update in rest], call, partial(config_of, base, source.path))
    attach(found, building, slots, words)
    building.settle()
    keep_original(source)
    target, told = Path(path_text(out)), Outcome(None)
    if slots is not None:
        _beside(target, adapter)
    inputs = [*inputs_of(adapter, base_weights), *(file for one in experts for file in inputs_of(one, None))]
    with placing(target, source, shares=True, inputs=inputs, overwrite=overwrite, made_from=made_from) as place_:
        path, beside = place_.path, None
        if slots is not None:
            slots.record()
        save(source.model, source, path, building.tensors.values())
        if slots is not None:
            beside = write_adapter(path, rest, path.with_name(f"{path.stem}.onnx_adapter"))
        if check is not False:
            given = None if isinstance(check, bool) else check
            alone = any(of_attention(*each) for each in context)
            told = checked_injection(model, rest, base, path, beside, given, alone=alone, tying=tying)
        warnings = (*wrong, *dict.fromkeys(tying.warnings), *clipping(told.saturation, source.model))
    note = "; ".join(filter(None, [used, words.note, told.note])) or None
    return Report(
        target, place_.files, tuple(found), told.difference, note, reference=told.reference, saturation=told.saturation,
        warnings=warnings,
    )  # fmt: skip


def _beside(out: Path, adapter: Any) -> Path:
    """The file that the adapter itself is written to, for a model with slots.

    Raises:
        UsageError: it is the model, or the file that the adapter is read from.
    """
    file = out.with_name(f"{out.stem}.onnx_adapter")
    source = None if isinstance(adapter, Adapter) else Path(adapter)
    if file == out or (source is not None and source.exists() and file.exists() and source.samefile(file)):
        why = "the adapter for its slots would be written over it"
        raise UsageError(why, path=file, cure="Give the output another name: -o OUT.onnx, out=")
    return file


def _slots(mode: str, building: Building) -> Any:
    if mode == "constant":
        return None
    from .slots import Slots

    return Slots(building)


def keep_original(source: Source) -> None:
    """Notes in the model's metadata the first model's bytes, but for runs that its stored tensors still hold.

    Raises:
        Unsupported: the model has been rewritten before.
    """
    model = source.model
    if ORIGINAL in model.metadata_props:
        raise Unsupported("an adapter is in this graph already", path=source.path, cure="Eject it first")
    runs, rest, end = [], [], 0
    for name, data in _inline(model):
        at = source.original.find(data, end)
        if at >= 0:
            runs.append([at, len(data), name])
            rest.append(source.original[end:at])
            end = at + len(data)
    rest.append(source.original[end:])
    packed = base64.b85encode(zlib.compress(b"".join(rest), 9)).decode()
    digest = hashlib.sha256(source.original).hexdigest()
    model.metadata_props[ORIGINAL] = json.dumps(
        {"sha256": digest, "size": len(source.original), "runs": runs, "rest": packed}
    )


def _inline(model: ir.Model) -> Sequence[tuple[str, bytes]]:
    """Stored tensors of the main graph in the order of the file, as the file holds them, large ones only."""
    held = ((name, value.const_value) for name, value in model.graph.initializers.items())
    return [
        (name, tensor.tobytes())
        for name, tensor in held
        if tensor is not None and not isinstance(tensor, ir.ExternalTensor) and tensor.nbytes >= 256
    ]


@places_errors
def eject(model: str | PathLike[str], out: str | PathLike[str]) -> Path:
    """Writes the model as it was before `inject`, byte for byte.

    Args:
        model: a file that `inject` wrote.
        out: the file to write; data files that the first model names must lie beside it, as they do here.

    Raises:
        UsageError: no adapter is in the model.
        Corrupt: the bytes do not come out as they were.
    """
    path, target = Path(path_text(model)), Path(path_text(out))
    try:
        loaded_model = ir.from_proto(_proto(path))
    except OSError as error:
        raise storage_error(error, path) from error
    note = loaded_model.metadata_props.get(ORIGINAL)
    if note is None:
        raise UsageError("no adapter is in this graph", path=path, cure="Name a file that inject wrote")
    data = _restored(loaded_model, note, path)
    write_bytes(target, data)
    return target


def _proto(path: Path) -> Any:
    import onnx

    proto = onnx.ModelProto()
    data = path.read_bytes()
    try:
        proto.ParseFromString(data)
    except Exception:
        raise Malformed("not an ONNX model", path=path, cure="Name a file that inject wrote") from None
    return proto


def _restored(model: ir.Model, note: str, path: Path) -> bytes:
    try:
        kept = json.loads(note)
        size, digest = int(kept["size"]), str(kept["sha256"])
        inflate = zlib.decompressobj()
        rest = inflate.decompress(base64.b85decode(kept["rest"]), max(size, 1))
        parts, end, taken = [], 0, 0
        for at, length, name in kept["runs"]:
            parts.append(rest[taken : taken + at - end])
            tensor = model.graph.initializers[name].const_value
            parts.append(b"" if tensor is None else tensor.tobytes())
            taken, end = taken + at - end, at + length
        data = b"".join([*parts, rest[taken:]])
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise Corrupt(f"its note of the first model is damaged ({error})", path=path, cure=_FRESH) from None
    if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
        raise Corrupt("the first model does not come out as it was", path=path, cure=_FRESH)
    return data


_FRESH = "Take the model that was injected into instead"
