"""Inject an adapter into a graph: add nodes beside the adapted layers, and keep the model's weights unchanged."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import onnx_ir as ir

from ..core.adapter import Adapter
from ..core.arguments import checks_types
from ..errors import Corrupt, Malformed, Unsupported, UsageError, places_errors, storage_error
from ..io.atomic import write_bytes
from ..io.lazy import as_lazy
from ..io.locations import path_text
from ..naming.binding import renamed
from .attaching import attach, unchangeable
from .building import Building
from .calls import CallWords
from .checking import CheckOutcome, checked_injection, refuse_invalid
from .contexts import of_attention, parted, place
from .conversion import inlined_note
from .experts import Experts
from .folders import folder_of, inject_folder, left_line, left_out, only_graph
from .model_file import GraphSource, opened, placing, save
from .reading import base_warnings, config_of, inputs_of, loaded, name_of
from .report import GraphReport
from .resolving import resolve
from .routed import remember_family
from .saturation import clipping
from .slot_values import write_adapter, write_slot_values
from .slots import neutral_of
from .tying import Tying
from .unblocking import unblock

if TYPE_CHECKING:
    import onnx

    from ..io.strict_json import JsonValue
    from .reading import Base, Model, Source
    from .resolved import ResolvedTarget
    from .rowwise import RowSlots
    from .slots import Slots
    from .trial_inputs import Feeds


def with_experts(adapter: Adapter, experts: Sequence[Adapter]) -> Adapter:
    """Return the adapter with `experts` added to its router.

    If no experts are passed and none are missing, the adapter is returned unchanged.

    Raises:
        Unsupported: the router is X-LoRA's classifier. Its logits are in the order of the torch model's modules, and a
            graph does not store this order.
        Other errors: as in `with_experts` in `adapterkit/torch/inject.py`.
    """
    if not experts and not any(getattr(update, "lacks_experts", False) for _, update in adapter):
        return adapter
    from ..torch.inject import with_experts as stacked

    return stacked(_no_order, adapter, experts).map(as_lazy)


def _no_order() -> NoReturn:
    why = "the logits of X-LoRA's classifier are in the order of the torch model's modules; a graph lacks this order"
    cure = "Inject the adapter and its experts into the torch model, and write them to one adapter file"
    raise Unsupported(why, where="(model): xlora", cure=cure)


ORIGINAL = "adapterkit.original"
"""Metadata key of a rewritten model. The value holds the data from which `eject` restores the original file."""

MERGED = "merged"
"""The value of `ORIGINAL` if an adapter was merged into the model later, so that the original cannot be restored."""

MODES = ("constant", "slots", "rows", "inputs")


@checks_types
@places_errors
def inject(
    model: Model,
    adapter: Adapter | str | PathLike[str],
    out: str | PathLike[str],
    *,
    mode: str = "constant",
    base_weights: Base | None = None,
    call: Mapping[str, JsonValue] | None = None,
    experts: Sequence[Adapter | str | PathLike[str]] = (),
    tied: str | Mapping[str, str] | None = None,
    strict_base: bool = False,
    rename: str | Sequence[str] = (),
    allow_partial: bool = False,
    check: bool | Feeds = True,
    overwrite: bool = True,
    made_from: str | None = None,
) -> GraphReport:
    """Attach an adapter to a graph, so that each target computes the adapter's formula.

    Args:
        model: an ONNX file, an in-memory model, or a folder of graphs that make up one model, such as encoder and
            decoders. The model is not changed.
        adapter: the adapter, or its path.
        out: the file to write. It refers to the model's external data files, which are copied only if `out` is in
            another folder. If the model is a folder, `out` is the folder to write: each graph gets the updates of its
            own targets, and all other files are copied.
        mode: `constant` writes the adapter into the graph. `slots` makes the adapter's tensors optional inputs, and
            writes the adapter beside `out` with the suffix `.onnx_adapter`, for `Session` and onnxruntime. `rows`
            is like `slots`, but each input stacks the tensors of several LoRAs, so that each row of a batch can use its
            own LoRA. `inputs` is like `slots`, but turns the tensors into required inputs, which every runtime can
            swap. With `inputs`, a LoRA needs a rank of at least 1, and three more files are written beside `out`.
            `OUT.slots.safetensors` stores the adapter's tensors under the names of the inputs.
            `OUT.neutral.safetensors` and `OUT.neutral.onnx_adapter` store tensors with which the graph gives the base
            model's outputs.
        base_weights: the weights of the model that the graph was exported from. With them, layers are also found if the
            graph has lost their names. If the adapter has a side network (Shadow), the network's architecture is read
            from the base's `config.json`, or from the `config.json` beside the graph.
        call: a map from the usual name of a model input, such as `input_ids`, to the graph's name for this value;
            needed only for names that differ. `{"task_ids": 1}` sets one task for all rows; without this entry, the
            graph gets a new input for the task. `{"hidden_states": "NAME"}` names the output of the last layer.
        experts: the adapters that a router (Arrow, X-LoRA) selects from, in the router's order; needed if the router's
            file does not contain them.
        tied: which layers an update changes if the embedding and the head have equal weights, as in `adapterkit.merge`.
            By default, an update changes the same layers as in the tool that trained the adapter.
        strict_base: refuse a base if its name, config or fingerprint differs from the base that the adapter names. By
            default, such a difference only adds a warning to the report.
        rename: rules for names that cannot be resolved, as in `adapterkit.merge`.
        allow_partial: omit targets that the graph lacks; the graph must have at least one target.
        check: run the result in onnxruntime and compare it with merged weights. A mapping gives the inputs by name;
            True uses generated inputs.
        overwrite: replace an existing `out`.
        made_from: a digest of everything that determines the output, stored with the output for later runs.

    Raises:
        TargetNotFound: the graph has no layer for a target, or several that cannot be distinguished.
        ShapeMismatch: the shape of a tensor does not fit its layer.
        Unsupported: a layer does not support the method of an update.
        Malformed: the file is not a model; its external data is missing, too short or outside the model's folder; or
            the model is so invalid that onnxruntime does not load it.
        UsageError: layers are tied, and neither the adapter nor `tied` shows which of these layers an update changes.
        CheckFailed: the written graph does not compute what merged weights compute, or `strict_base` is set and the
            base differs. No file is left at `out`.
    """
    if mode not in MODES:
        raise UsageError(f"unknown mode {mode!r}", where="mode", cure=f"Known: {', '.join(MODES)}")
    if (folder := folder_of(model, out)) is not None:
        return inject_folder(
            inject, folder, adapter, out, mode=mode, base_weights=base_weights, call=call, experts=experts, tied=tied,
            strict_base=strict_base, rename=rename, allow_partial=allow_partial, check=check, overwrite=overwrite,
            made_from=made_from,
        )  # fmt: skip
    source = opened(only_graph(model))
    read, base = loaded(adapter, base_weights)
    wrong = base_warnings([(name_of(adapter), read)], base, strict_base)
    tying = Tying.of(base, source.path, tied)
    read = with_experts(read, [loaded(expert, None)[0] for expert in experts])
    (read,) = renamed([read], rename)
    rest, context = parted(read)
    if allow_partial:
        rest, lost = left_out(source.model, rest, base, tying)
        wrong = (*wrong, *lost)
    if context and mode != "constant":
        cure = (
            "Inject the adapter with --mode constant (mode='constant'). Then a run uses the prompt only if its input "
            "contains the prompt's token ids, and uses the prefix only if no past is passed"
        )
        raise Unsupported("prompts and prefixes cannot be slots", where=str(context[0][0]), cure=cure)
    unblock(source.model, base)  # This adds nodes, so do it before `Building` collects the names that are taken.
    building = Building(source.model)
    used = place(context, building)
    places = resolve(source.model, rest, base, tying)
    if allow_partial and (inside := unchangeable(places, mode == "rows")) and len(inside) < len(rest.updates):
        rest = rest.replace(updates={target: group for target, group in rest.updates.items() if target not in inside})
        places = [at for at in places if at.asked not in inside]
        wrong = (*wrong, *left_line(inside, "added nodes cannot change these experts"))
    slots = _slots(mode, building)
    words = CallWords(building, [update for _, update in rest], call, partial(config_of, base, source.path))
    try:
        attach(places, building, slots, words)
    except Unsupported:
        # An invalid graph, e.g. one that mixes dtypes, may be the cause of this error. If so, report the graph instead.
        if check is not False:
            refuse_invalid(opened(model))
        raise
    building.settle()
    keep_original(source)
    target, outcome = Path(path_text(out)), CheckOutcome(None)
    if slots is not None:
        _beside(target, adapter)
    inputs = [*inputs_of(adapter, base_weights), *(file for one in experts for file in inputs_of(one, None))]
    with placing(target, source, shares=True, inputs=inputs, overwrite=overwrite, made_from=made_from) as place_:
        path, beside = place_.path, None
        if slots is not None:
            slots.record()
            remember_family(source.model, rest, tying.config)
        save(source.model, source, path, building.tensors.values())
        if slots is not None:
            beside = write_adapter(path, rest, path.with_name(f"{path.stem}.onnx_adapter"), base_weights=base)
            if mode == "inputs":
                _write_values(path, rest, base)
        if check is not False:
            given = None if isinstance(check, bool) else check
            alone = any(of_attention(*each) for each in context)
            options: dict[str, Any] = {"alone": alone, "tying": tying, "by_rows": mode == "rows"}
            outcome = checked_injection(model, rest, base, path, beside, given, **options)
            if outcome.difference is None:
                refuse_invalid(opened(model))
        warnings = (*wrong, *dict.fromkeys(tying.warnings), *clipping(outcome.saturation, source.model))
    slow = None if slots is None else _recomputed(places)
    inlined = inlined_note(source.model)
    note = "; ".join(filter(None, [used, words.note, slow, inlined, outcome.note])) or None
    return GraphReport(
        target, place_.files, tuple(places), outcome.difference, note, reference=outcome.reference,
        saturation=outcome.saturation, warnings=warnings,
    )  # fmt: skip


def _recomputed(places: Sequence[ResolvedTarget]) -> str | None:
    """Return the report's note about MoE nodes that have slots; None if the adapter changes no experts."""
    nodes = {spot.node for place in places for spot in place.spots if issubclass(spot.kind, Experts)}
    if not nodes:
        return None
    split = sum(node.graph is None for node in nodes)  # `with_split` removed these nodes.
    if split == len(nodes):
        return f"{split} MoE {'nodes were' if split > 1 else 'node was'} split into nodes for each expert"
    return (
        f"every run, with or without an adapter, recomputes the weights of all experts in {len(nodes)} MoE "
        f"{'nodes' if len(nodes) > 1 else 'node'}; with --mode constant (mode='constant'), they are computed once"
    )


def _beside(out: Path, adapter: Source) -> Path:
    """Return the path of the adapter file to write beside a graph with slots.

    Raises:
        UsageError: the path is `out` itself, or the path of the file that the adapter is read from.
    """
    file = out.with_name(f"{out.stem}.onnx_adapter")
    source = None if isinstance(adapter, Adapter) else Path(adapter)
    if file == out or (source is not None and source.exists() and file.exists() and source.samefile(file)):
        why = "the adapter file for the graph's slots would replace this file"
        raise UsageError(why, path=file, cure="Choose another name for the output: -o OUT.onnx (out=)")
    return file


def _slots(mode: str, building: Building) -> Slots | RowSlots | None:
    if mode == "constant":
        return None
    from .rowwise import RowSlots
    from .slots import Slots

    return RowSlots(building) if mode == "rows" else Slots(building, required=mode == "inputs")


def _write_values(path: Path, adapter: Adapter, base: Base | None) -> None:
    """Write files for a graph's required inputs: the adapter's tensors, and tensors that give the base's output."""
    write_adapter(path, adapter, path.with_name(f"{path.name}.slots.safetensors"), base_weights=base)
    feeds = neutral_of(opened(path).model)
    for ending in (".safetensors", ".onnx_adapter"):
        write_slot_values(feeds, path.with_name(f"{path.name}.neutral{ending}"))


def keep_original(source: GraphSource) -> None:
    """Store the original file in the model's metadata, except for the bytes that the model's tensors still contain.

    Raises:
        Unsupported: the model already has an injected adapter.
    """
    model = source.model
    if ORIGINAL in model.metadata_props:
        raise Unsupported(
            "the graph already has an injected adapter",
            path=source.path,
            cure="Eject the adapter first, in Python: adapterkit.onnx.eject(MODEL, OUT)",
        )
    runs, rest, end = [], [], 0
    for name, data in _inline(model):
        # `_inline` returns the tensors in the order of the file, so search only after the previous tensor's bytes.
        at = source.original.find(data, end)
        if at >= 0:
            runs.append([at, len(data), name])
            rest.append(source.original[end:at])
            end = at + len(data)
    rest.append(source.original[end:])
    # Encode as base85, because metadata is text, and base64 takes more space.
    packed = base64.b85encode(zlib.compress(b"".join(rest), 9)).decode()
    digest = hashlib.sha256(source.original).hexdigest()
    model.metadata_props[ORIGINAL] = json.dumps(
        {"sha256": digest, "size": len(source.original), "runs": runs, "rest": packed}
    )


def _inline(model: ir.Model) -> Sequence[tuple[str, bytes]]:
    """Return the name and bytes of each initializer that is inside the model file and has at least 256 bytes.

    The initializers of subgraphs are omitted. The result is in the order of the file.
    """
    constants = ((name, value.const_value) for name, value in model.graph.initializers.items())
    return [
        (name, tensor.tobytes())
        for name, tensor in constants
        if tensor is not None and not isinstance(tensor, ir.ExternalTensor) and tensor.nbytes >= 256
    ]


@checks_types
@places_errors
def eject(model: str | PathLike[str], out: str | PathLike[str]) -> Path:
    """Restore the model file as it was before `inject`, byte for byte, and write it to `out`.

    Args:
        model: a file that `inject` wrote.
        out: the file to write. If the original has external data files, put `out` into their folder, because a model
            refers to these files by relative paths.

    Raises:
        UsageError: the model has no injected adapter, or `merge` has changed the model after `inject`.
        Malformed: the file is not an ONNX model.
        Corrupt: the stored data of the original is damaged, or the restored bytes differ from the original.
    """
    path, target = Path(path_text(model)), Path(path_text(out))
    try:
        loaded_model = ir.from_proto(_proto(path))
    except OSError as error:
        raise storage_error(error, path) from error
    note = loaded_model.metadata_props.get(ORIGINAL)
    if note is None:
        raise UsageError("no adapter is injected into this graph", path=path, cure="Pass a file that inject wrote")
    if note == MERGED:
        cure = f"{_FRESH}. To get both, merge into the original before you inject"
        raise UsageError("an adapter was merged into this graph after inject wrote it", path=path, cure=cure)
    data = _restored(loaded_model, note, path)
    write_bytes(target, data)
    return target


def _proto(path: Path) -> onnx.ModelProto:
    import onnx

    proto = onnx.ModelProto()
    data = path.read_bytes()
    try:
        proto.ParseFromString(data)
    except Exception:
        raise Malformed("not an ONNX model", path=path, cure="Pass a file that inject wrote") from None
    return proto


def _restored(model: ir.Model, note: str, path: Path) -> bytes:
    try:
        kept = json.loads(note)
        size, digest = int(kept["size"]), str(kept["sha256"])
        inflate = zlib.decompressobj()
        # Limit the size of the result: a few bytes can decompress to gigabytes.
        rest = inflate.decompress(base64.b85decode(kept["rest"]), max(size, 1))
        parts, end, taken = [], 0, 0
        for at, length, name in kept["runs"]:
            parts.append(rest[taken : taken + at - end])
            tensor = model.graph.initializers[name].const_value
            parts.append(b"" if tensor is None else tensor.tobytes())
            taken, end = taken + at - end, at + length
        data = b"".join([*parts, rest[taken:]])
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise Corrupt(f"the stored data of the original model is damaged ({error})", path=path, cure=_FRESH) from None
    if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
        raise Corrupt("the restored model differs from the original", path=path, cure=_FRESH)
    return data


_FRESH = "Use your own copy of the original model"
