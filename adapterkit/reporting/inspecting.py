"""Describe an adapter, a base or a graph as plain data.

Tensor values are read only to measure the change of each layer (`layers`), to compare a graph with `base_weights`, and
to compute a base's fingerprint. Everything else comes from file headers, config files and model cards. `facts_of`
collects the facts that a report shows: methods, base, size, licence, lineage, and the formats and tools that can use
the adapter.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.metadata import metadata_of, trigger_words
from ..core.tables import html_table
from ..core.updates import Additive
from ..errors import UsageError, public
from ..io.lazy import DTYPES, dtype_of

if TYPE_CHECKING:
    from ..core.adapter import Adapter, Target
    from ..core.updates import Update
    from ..formats._format import Format
    from ..io.checkpoint import Checkpoint
    from ..io.lazy import Lazy, Leaf
    from ..io.safetensors import Entry
    from ..io.strict_json import JsonValue

WAYS = {
    "native": "stores the adapter natively",
    "LoRA": "stores the adapter exactly, as a LoRA",
    "dense": "stores the adapter as a weight difference; needs the base",
    "nearest": "stores the nearest LoRA, and reports the error",
}
"""The ways in which a format can store an adapter, each with a description. The best way comes first."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts about an adapter, from its headers and the model card next to it.

    Attributes:
        name: the adapter's name in the report.
        path: the path from which the adapter was read; None for an adapter in memory.
        format: the format of the source file, or None.
        base: the id of the base that the adapter records, or None.
        methods: method -> number of updates.
        ranks: rank -> number of updates; updates without a rank are omitted.
        targets: the number of targets.
        parameters: the number of parameters. A tensor that several updates share counts once.
        bytes: the size of the adapter's tensors in bytes.
        dtypes: dtype -> number of tensors.
        licence: the identifier of the licence in the model card next to the adapter, or None.
        triggers: the trigger words.
        lineage: the steps that produced the adapter, as plain data.
        formats: format -> the key of `WAYS` that describes how the format can store the adapter. Formats that cannot
            store the adapter are omitted.
        loaders: one dict per tool that supports this kind of model. The dict shows whether the tool can load the file
            without conversion. The keys are `title`, `loads` and `why`; see `adapterkit.loaders.Answer`. `loaders` is
            empty unless the adapter was read from a file in a format of image models.
    """

    name: str
    path: str | None
    format: str | None
    base: str | None
    methods: dict[str, int]
    ranks: dict[int, int]
    targets: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    licence: str | None
    triggers: tuple[str, ...]
    lineage: tuple[dict[str, Any], ...]
    formats: dict[str, str]
    loaders: tuple[dict[str, str], ...] = ()

    def record(self) -> dict[str, JsonValue]:
        """Return the facts as plain data."""
        return {**asdict(self), "ranks": {str(rank): count for rank, count in self.ranks.items()}}


def facts_of(adapter: Adapter, name: str, path: Path | None = None) -> Facts:
    """Collect the facts that a report shows about an adapter.

    Args:
        adapter: the adapter.
        name: the adapter's name in the report.
        path: the path from which the adapter was read. The licence is read from the model card at this path.
    """
    from ..core.licence_terms import licence_at

    leaves = {id(leaf): leaf for _, update in adapter for leaf in update.tensors.values()}
    sizes = [(math.prod(leaf.shape), dtype_of(leaf).name) for leaf in leaves.values()]
    ranks = Counter(
        rank for target, update in adapter if isinstance(rank := update.dims(target.stacked).get("r"), int)
    )  # fmt: skip
    read = next((step for step in adapter.recipe if step.op == "read"), None)
    format_name = None if read is None else read.args.get("format")
    return Facts(
        name, None if path is None else str(path), format_name if isinstance(format_name, str) else None,
        adapter.base.id if adapter.base else None, dict(Counter(update.method for _, update in adapter).most_common()),
        dict(sorted(ranks.items())), len(adapter.updates), sum(count for count, _ in sizes),
        sum(count * DTYPES[dtype].itemsize for count, dtype in sizes),
        dict(Counter(dtype for _, dtype in sizes).most_common()),
        None if path is None else licence_at(path).get("license"), trigger_words(metadata_of(adapter)),
        tuple({"op": step.op, "args": dict(step.args)} for step in adapter.recipe), formats_of(adapter),
        () if path is None or read is None else _image_loaders(adapter, read.args.get("format"), path),
    )  # fmt: skip


def _image_loaders(adapter: Adapter, name: object, path: Path) -> tuple[dict[str, str], ...]:
    from ..formats import FORMATS
    from ..formats._image.image_format import ImageFormat

    if not isinstance(name, str) or name not in FORMATS or not issubclass(FORMATS[name], ImageFormat):
        return ()
    from ..loaders import loaders_of

    answers = loaders_of(adapter, name, path, convert=False)
    return tuple({"title": each.title, "loads": each.loads, "why": each.why} for each in answers)


def formats_of(adapter: Adapter) -> dict[str, str]:
    """Return the formats that can store the adapter, each with the key of `WAYS` that describes how.

    Only the adapter's methods and the kind of model (image or language) are checked.
    """
    from ..formats import FORMATS
    from ..methods import METHODS
    from ..naming.image import component_of, shape

    # Paths that differ only in their numbers are the same module in different blocks. Check one path for each module.
    paths = {shape(target.path): target.path for target in adapter.updates}.values()
    kind = "image" if any(map(component_of, paths)) else "language"
    methods = [METHODS[name] for name in adapter.methods]
    order = [*WAYS]
    by_format = {}
    for name, entry in FORMATS.items():
        ways = [way(entry, method) for method in methods]
        if ways and all(ways) and entry.models in ("", kind):
            by_format[name] = max((each for each in ways if each), key=order.index)
    return dict(sorted(by_format.items(), key=lambda item: (order.index(item[1]), item[0])))


def way(entry: type[Format], method: type[Update]) -> str | None:
    """Return how a format can store updates of a method (a key of `WAYS`); None if the format cannot store them."""
    if method.__module__.rpartition(".")[2] in entry.methods:
        return "native"
    if method.kind not in ("additive", "weight") or "lora" not in entry.methods:
        return None
    if issubclass(method, Additive) and method.pair is not Additive.pair:
        return "LoRA"
    return "dense" if entry.differences else "nearest"


@dataclass(frozen=True, eq=False)
class Inspection:
    """The description of a file or a folder.

    Attributes:
        kind: `adapter`, `base` or `graph`.
        path: the path of the file or folder.
        data: the whole description as plain data; `adapterkit inspect --json` prints it.
    """

    kind: str
    path: str
    data: Mapping[str, JsonValue]

    def record(self) -> dict[str, JsonValue]:
        """Return the description as plain data."""
        return dict(self.data)

    @property
    def totals(self) -> Mapping[str, JsonValue]:
        """The totals. For an adapter: `targets`, `updates`, `parameters`, `bytes`, `methods` and `dtypes`."""
        totals = self.data.get("totals")
        return totals if isinstance(totals, Mapping) else {}

    def __repr__(self) -> str:
        name = public(self.path)
        data: Mapping[str, Any] = self.data
        if self.kind == "adapter" and data.get("format") is None:
            return f"Inspection({name!r}: unreadable adapter with {len(data['modules']):,} modules)"
        totals = data.get("totals", {})
        if self.kind == "adapter":
            methods = ", ".join(f"{count:,} {method}" for method, count in totals["methods"].items())
            return f"Inspection({name!r}: {data['format']} adapter, {totals['targets']:,} targets: {methods})"
        if self.kind == "base":
            return f"Inspection({name!r}: base, {totals['tensors']:,} tensors, {totals['parameters']:,} parameters)"
        return f"Inspection({name!r}: graph, {totals['layers']:,} layers)"

    def _repr_html_(self) -> str:
        data: Mapping[str, Any] = self.data
        if self.kind == "adapter" and "updates" in data:
            heads = ("target", "method", "rank", "shapes", "parameters")
            rows = [
                [each["target"], each["method"], each["rank"],
                 " ".join(f"{name}{tensor['shape']}" for name, tensor in each["tensors"].items()), each["parameters"]]
                for each in data["updates"]
            ]  # fmt: skip
            return html_table(repr(self), heads, rows)
        if self.kind == "base":
            tensors = [[each["name"], each["shape"], each["dtype"], each["bytes"]] for each in data["tensors"]]
            return html_table(repr(self), ("tensor", "shape", "dtype", "bytes"), tensors)
        if self.kind == "graph":
            layers = [[each["target"], each["shape"], each["method"]] for each in data["layers"]]
            return html_table(repr(self), ("target", "shape", "found by"), layers)
        return html_table(repr(self), ("module",), [[module] for module in data["modules"]])


def graph_record(src: str, base_weights: str | os.PathLike[str] | None) -> dict[str, JsonValue]:
    """Describe an ONNX graph as plain data: list all layers that an adapter can target."""
    from ..onnx import layers

    records = [place.record() for place in layers(src, base_weights=base_weights)]
    methods = _counts(str(place["method"] or "nothing") for place in records)
    return {"kind": "graph", "path": src, "layers": records, "totals": {"layers": len(records), "methods": methods}}


def folder_record(src: str, base_weights: str | os.PathLike[str] | None) -> dict[str, object]:
    """Describe a folder of ONNX graphs as plain data: list all graphs, and the layers that an adapter can target.

    The record of each layer has the name of the graph that contains the layer.
    """
    from ..onnx import layers
    from ..onnx.folders import parts_of

    parts, records = parts_of(Path(src)), []
    for part in parts:
        places_here = layers(part.path, base_weights=base_weights)
        records += [{"graph": part.name.as_posix(), **place.record()} for place in places_here if place.spots]
    graphs = [
        {"name": part.name.as_posix(), "part": part.role,
         "layers": sum(each["graph"] == part.name.as_posix() for each in records)}
        for part in parts
    ]  # fmt: skip
    methods = _counts(str(place["method"] or "nothing") for place in records)
    return {
        "kind": "graph", "path": src, "graphs": graphs, "layers": records,
        "totals": {"layers": len(records), "methods": methods},
    }  # fmt: skip


def graph_file(src: str) -> str | None:
    """Return the path of an ONNX file: `src` itself, or the only graph in the folder `src`.

    Return None for anything else, such as a folder with weights.
    """
    if src.lower().endswith(".onnx"):
        return src
    try:
        names = sorted(os.listdir(src))
    except (OSError, ValueError):  # `src` is an address, or is not a folder.
        return None
    graphs = [name for name in names if name.lower().endswith(".onnx")]
    alone = len(graphs) == 1 and not any(name.lower().endswith(_WEIGHTS) for name in names)
    return os.path.join(src, graphs[0]) if alone else None


def graph_folder(src: str) -> str | None:
    """Return `src` if it is a folder with ONNX graphs and without weight files; None for anything else.

    optimum and onnxruntime-genai write such folders.
    """
    try:
        names = [name for name in os.listdir(src) if not name.startswith(".")]
        inner = [name for name in names if os.path.isdir(os.path.join(src, name))]
        below = [one for name in inner for one in os.listdir(os.path.join(src, name))]
    except (OSError, ValueError):  # `src` is an address, or is not a folder.
        return None
    graphs = any(name.lower().endswith(".onnx") for name in (*names, *below))
    return src if graphs and not any(name.lower().endswith(_WEIGHTS) for name in names) else None


_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
"""Extensions of weight files. A folder with weight files is described as an adapter or a base, even if it also has a
graph."""


def inspected(
    src: str, *, format: str | None = None, base: Checkpoint | str | os.PathLike[str] | None = None,  # noqa: A002
    compat: str | None = None, layers: bool = False, rename: str | Sequence[str] = (),
    base_weights: str | os.PathLike[str] | None = None, reading: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Describe the file or folder at a path, as plain data; see `adapterkit.inspect`.

    Args:
        src: the path or address of an adapter, a base or an ONNX graph.
        format: the adapter's format; detected from the file headers if None.
        base: the base of an adapter.
        compat: `formula` to apply the paper's formula instead of the training tool's; see `adapterkit.read`.
        layers: whether to measure the change of each layer.
        rename: rules that rename targets to names in the base.
        base_weights: the weights of the model from which the graph was exported.
        reading: further keyword arguments for `adapterkit.read`.
    """
    from ..errors import TargetNotFound, UnknownFormat
    from ..formats import detect, read
    from ..formats._others import adapter_modules
    from ..io.inputs import inputs_kept
    from ..io.locations import headers_of
    from ..naming.binding.fitting import TO_REFUSE, check_base

    graph = graph_file(src)
    if graph is not None and (graph == src or not _is_adapter(Path(src))):
        return graph_record(graph, base_weights)
    if graph is None and graph_folder(src) is not None and not _is_adapter(Path(src)):
        return folder_record(src, base_weights)
    if base_weights is not None:
        why = "base_weights= applies only to an ONNX graph; for an adapter, pass base="
        raise UsageError(why, where="base_weights", cure="Pass the base: --base BASE (base=)")
    if rename and base is None:
        raise UsageError("rename= requires a base", where="rename", cure="Pass the base: --base BASE (base=)")
    with headers_of(src) as path, inputs_kept():
        modules = adapter_modules(path) if base is None else {}
        if format is None and not modules and not _is_adapter(path):
            return base_record(path, src)
        values: str | None = None
        try:
            name = format or detect(path)
            adapter = read(path, name, base, compat=compat, **reading)
        except (TargetNotFound, UnknownFormat, UsageError) as error:
            # If the adapter cannot be read, for example because alpha is missing, describe its modules. If `reading`
            # has arguments, a UsageError may be about these arguments, so raise the error.
            if modules and not (isinstance(error, UsageError) and reading):
                return _unresolved_record(modules, src, error)
            needs_base = base is not None or layers or reading
            outlined = None if needs_base else outline_of(path, format, compat, error)
            if outlined is None:
                raise
            (name, adapter), values = outlined, error.why
        record = adapter_record(adapter, src, name)
        if values is not None:
            record["values"] = values
        if name in _IMAGE:
            record["loaders"] = _loaders(adapter, name, path)
        if base is not None:
            record["names"] = _names(adapter, base, rename)
            wrong = check_base([(src, adapter)], base, strict=False)
            record["warnings"] = [f"{why}{TO_REFUSE}" for why in wrong]
        record |= {**_licence(path), "triggers": list(trigger_words(metadata_of(adapter)))}
        if layers:
            record["layers"] = _layers(adapter, base, rename)
        return record


def outline_of(path: Path, name: str | None, compat: str | None, error: Exception) -> tuple[str, Adapter] | None:
    """Return the format, the targets and the shapes of an adapter that cannot be read without its base.

    The targets and shapes are returned as an `Adapter`; see `formats.outline`. Return None if the format cannot be
    detected, if `formats.outline` fails, or if `error` is not a UsageError.

    Args:
        path: the file or folder.
        name: the adapter's format; detected if None.
        compat: the caller's `compat` argument; if it is not None, the result is None.
        error: the error that was raised when the adapter was read.
    """
    from ..errors import AdapterkitError
    from ..formats import detect, outline

    if not isinstance(error, UsageError) or compat is not None:
        return None
    try:
        name_found = name or detect(path)
        return name_found, outline(path, name_found)
    except AdapterkitError:
        return None


def _licence(path: Path) -> dict[str, JsonValue]:
    """Return the licence that the model card names, its SPDX identifier, and its requirements for derived works.

    The requirements are None if the licence is unknown, or if it only requires that notices are kept.
    """
    from ..core.licence_terms import choices, is_expression, licence_at, spdx_expression_of, spdx_of, terms_of

    licence = licence_at(path)
    asked = (terms_of(each) for each in choices(licence)[0])
    asks = "; ".join(dict.fromkeys(terms.asks for terms in asked if terms is not None and not terms.plain)) or None
    identifier = spdx_expression_of(licence) if is_expression(licence) else spdx_of(licence)
    return {"licence": licence.get("license"), "licence_spdx": identifier, "licence_asks": asks}


def _layers(
    adapter: Adapter, base: Checkpoint | str | os.PathLike[str] | None, rename: Sequence[str]
) -> list[dict[str, JsonValue]]:
    """Return one record per layer, in the order of the layers.

    Each record has the norm of the layer's change, and the layer's share of the adapter's squared norm.
    """
    from ..io.checkpoint import opened
    from .measuring import measure

    measured = measure([adapter], ["adapter"], base=None if base is None else opened(base), rename=rename)
    if measured.base_why is not None:
        raise UsageError(f"layers: {measured.base_why}", where="layers", cure="Pass another base: --base BASE (base=)")
    by_layer: dict[str, list[Any]] = {}
    for effect in sorted(measured.effects, key=lambda each: measured.cells[each.target].order):
        by_layer.setdefault(measured.cells[effect.target].layer, []).append(effect)
    total = measured.norm(0) ** 2
    records = []
    for layer, effects in by_layer.items():
        sizes = [effect.norm for effect in effects if effect.norm is not None]
        square = math.fsum(size * size for size in sizes)
        most = max((each for each in effects if each.norm), key=lambda each: each.norm, default=None)
        records.append({
            "layer": layer, "targets": len(effects), "norm": math.sqrt(square) if sizes else None,
            "share": square / total if total and sizes else None,
            "largest": most and measured.cells[most.target].module,
            "why": next((each.why for each in effects if each.why), None),
        })  # fmt: skip
    return records


def _names(adapter: Adapter, base: Checkpoint | str | os.PathLike[str], rename: Sequence[str]) -> dict[str, JsonValue]:
    """Return the rules that map the adapter's names to the base's names, and the model family.

    If the adapter does not fit the base, return the reason.
    """
    from ..errors import AdapterkitError
    from ..naming.binding.fitting import name_map

    try:
        mapping = name_map(base, adapter, rename=rename)
    except AdapterkitError as error:
        return {"fits": False, "why": str(error)}
    return {"fits": True, "family": mapping["family"], "rules": mapping["rules"]}


def _is_adapter(path: Path) -> bool:
    """Whether any format recognises `path`. Also True if `path` is missing, because `read` then raises the error."""
    from ..formats import recognised

    return not path.exists() or bool(recognised(path))


def adapter_record(adapter: Adapter, src: str, source_format: str) -> dict[str, Any]:
    """Return an adapter's updates, lineage and totals as plain data. A shared tensor counts once in the totals."""
    from ..formats import unknown_fields

    leaves = _counted({id(leaf): leaf for _, update in adapter for leaf in update.tensors.values()}.values())
    base = adapter.base
    shared: dict[Any, dict[str, Any]] = {}
    return {
        "kind": "adapter", "path": src, "format": source_format, "unknown_fields": unknown_fields(adapter),
        "base": base and {"id": base.id, "revision": base.revision, "config_hash": base.config_hash},
        "updates": [_update_record(target, update, shared) for target, update in adapter],
        "families": _families(adapter), "metadata": metadata_of(adapter), "without_alpha": _without_alpha(adapter),
        "recipe": [{"op": step.op, "args": dict(step.args)} for step in adapter.recipe],
        "totals": {
            "targets": len(adapter.updates), "updates": len(adapter), **_sums(leaves),
            "methods": _counts(update.method for _, update in adapter),
            "dtypes": _counts(dtype for (_, dtype), count in leaves.items() for _ in range(count)),
        },
    }  # fmt: skip


_IMAGE = ("bfl_control", "comfyui", "diffusers", "kohya", "lycoris", "xlabs")
"""Formats of image models. An adapter in another format is not compared with the families of image models."""


def _loaders(adapter: Adapter, name: str, path: Path) -> list[dict[str, str]]:
    """Return one record per tool that supports the adapter's kind of model.

    The record states whether the tool can load the file without conversion, and if not, why; see `loaders.Answer`.
    """
    from ..loaders import loaders_of

    return [asdict(answer) for answer in loaders_of(adapter, name, path, convert=False)]


def _families(adapter: Adapter) -> list[str]:
    """Return the families of image and video models to which the adapter may belong."""
    from ..formats._image.deciding import candidates, denoiser_targets, origin_of
    from ..naming.image import component_of

    if not any(step.op == "read" and step.args.get("format") in _IMAGE for step in adapter.recipe):
        return []
    inside = [target for target in adapter.updates if component_of(target.path) in ("unet", "transformer")]
    targets = denoiser_targets(adapter.updates, ()) if inside else []
    return (
        [family.title for family in candidates(adapter.updates, targets, origin_of(adapter, None))] if targets else []
    )


def _without_alpha(adapter: Adapter) -> int:
    """Return the number of modules without an alpha in the file; 0 if the format's scaling does not use alpha."""
    foreign = adapter.foreign
    if any(step.op == "read" and step.args.get("alpha") == "rank" for step in adapter.recipe[:1]):
        return len(adapter.updates)
    if foreign is None or foreign.format not in ("kohya", "lycoris", "comfyui"):
        return 0
    listed = foreign.data.get("without_alpha", ())
    return len(listed) if isinstance(listed, (list, tuple)) else 0


def _unresolved_record(
    modules: Mapping[str, Mapping[str, Lazy | Entry]], src: str, error: Exception
) -> dict[str, JsonValue]:
    """Return the record of an adapter that cannot be read: the reason, and the tensor shapes of each module."""
    return {
        "kind": "adapter", "path": src, "format": None, "why": str(error),
        "modules": {
            module: {slot: list(tensor.shape) for slot, tensor in slots.items()} for module, slots in modules.items()
        },
    }  # fmt: skip


def _update_record(target: Target, update: Update, shared: dict[object, dict[str, JsonValue]]) -> dict[str, JsonValue]:
    """Return an update as plain data.

    The record without the target's path is cached in `shared`. The cache key is the target's layout, the target's rows
    and `update.form`.
    """
    form = target.layout, target.rows, update.form
    if form not in shared:
        tensors = update.tensors
        shared[form] = {
            "layout": target.layout, "rows": target.rows, "method": update.method, "kind": update.kind,
            "rank": update.dims(target.stacked).get("r"), "attributes": update.attributes,
            "tensors": {
                name: {"shape": list(leaf.shape), "dtype": str(dtype_of(leaf))} for name, leaf in tensors.items()
            },
            **_sums(_counted(tensors.values())),
        }  # fmt: skip
    return {"target": target.path, **shared[form]}


def base_record(path: Path, src: str) -> dict[str, Any]:
    """Return a base's tensors and totals as plain data."""
    from ..errors import UnknownFormat
    from ..formats._others import other_file
    from ..io.checkpoint import open_checkpoint

    try:
        base = open_checkpoint(path)
    except UsageError as error:
        cure = "Pass a base (a weight file or a folder of weight files), or an adapter; see 'adapterkit list formats'"
        raise UnknownFormat(f"the path is neither an adapter nor a base: {error.why}", path=src, cure=cure) from error
    tensors, facts = _stored(base)
    dtypes = sorted({str(tensor["dtype"]) for tensor in tensors})
    other = other_file(base.tensors)
    warnings = []
    if other is not None:
        kind, key = other
        warnings = [f"keys such as {key} belong to {kind.name}, which is not supported: {kind.why}. {kind.cure}"]
    return {
        "kind": "base", "path": src, "model_type": (base.config or {}).get("model_type"), **_licence(path),
        "files": [file.name for file in base.files], **({"warnings": warnings} if warnings else {}), **facts,
        **_quantization(base), "tensors": tensors,
        "totals": {
            **_total(tensors),
            "dtypes": {dtype: _total([t for t in tensors if t["dtype"] == dtype]) for dtype in dtypes},
        },
    }  # fmt: skip


def _stored(base: Checkpoint) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a record for each tensor of a base, and facts about the model.

    The facts are the possible model families and, for GGUF files, the architecture and the name from the header. The
    lazy tensor of a quantized GGUF weight has only packed bytes, so shapes and types of GGUF tensors come from the
    header.
    """
    from ..io.gguf_file import read_model
    from ..io.inputs import is_gguf

    headers = {file.name: read_model(file) for file in base.files if is_gguf(file)}
    records = []
    for name, tensor in base.tensors.items():
        header = headers.get(base.home[name].name)
        shape, dtype = (
            (tensor.shape, str(tensor.dtype)) if header is None else (header.shapes[name], header.types[name])
        )
        size = _sums(_counted([tensor])) | {"parameters": math.prod(shape)}
        records.append({"name": name, "shape": list(shape), "dtype": dtype, **size, "file": base.home[name].name})
    facts: dict[str, Any] = {}
    for header in headers.values():
        header_values = {key: value.value for key, value in header.values.items()}
        facts |= {word: header_values[key] for word, key in _GGUF.items() if key in header_values}
    families_here = _families_of_base(base, str(facts.get("architecture", "")))
    return records, {**facts, **({"families": families_here} if families_here else {})}


def _quantization(base: Checkpoint) -> dict[str, JsonValue]:
    """Return the quantization scheme of a base, and its number of parameters before quantization."""
    from ..errors import AdapterkitError
    from ..quant import dequantized, is_quantized

    if not is_quantized(base):
        return {}
    try:
        seen = dequantized(base)
    except AdapterkitError as error:
        return {"quantized": {"scheme": None, "why": error.why}}
    count = sum(math.prod(tensor.shape) for tensor in seen.tensors.values())
    return {"quantized": {"scheme": seen.scheme, "weights": len(seen.packed), "parameters": count}}


def _families_of_base(base: Checkpoint, architecture: str) -> list[str]:
    """Return the image and video families to which a base may belong.

    Return no families if the base's config has a `model_type`, if `of_gguf` knows the architecture in the GGUF header,
    or if the base has more than `_DENOISER` tensors.
    """
    from ..formats._image.deciding import families_in
    from ..naming.architectures import of_gguf
    from ..naming.image import families

    kind = (base.config or {}).get("model_type")
    if kind is not None or (architecture and of_gguf(architecture)) or len(base.tensors) > _DENOISER:
        return []
    named = {family.name: family.title for family in families()}
    return [named[name] for name in families_in(base)]


_DENOISER = 8_000
"""A base with more tensors than this is not an image model: no published image model has so many tensors, not even a
whole pipeline."""

_GGUF = {"architecture": "general.architecture", "name": "general.name"}
"""Key in a base's record -> key in the header of a GGUF file."""


def _total(tensors: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {"tensors": len(tensors), **{word: sum(t[word] for t in tensors) for word in ("parameters", "bytes")}}


def _counted(leaves: Iterable[Leaf]) -> Counter[tuple[tuple[int, ...], str]]:
    """Return the number of tensors for each (shape, dtype)."""
    return Counter((tuple(leaf.shape), dtype_of(leaf).name) for leaf in leaves)


def _sums(tensors: Mapping[tuple[tuple[int, ...], str], int]) -> dict[str, int]:
    """Return the total numbers of elements and bytes of the tensors that `_counted` counted."""
    sizes = [(math.prod(shape) * count, DTYPES[dtype].itemsize) for (shape, dtype), count in tensors.items()]
    return {"parameters": sum(count for count, _ in sizes), "bytes": sum(count * width for count, width in sizes)}


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))
