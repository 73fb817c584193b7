"""Show the contents of an adapter, a base or a graph.

SRC is an adapter in any known format, a base (a folder of weights or one weight file), or an ONNX model, on disk or on
a hub (hf://org/repo). Only file headers are read, except with --layers. For an ONNX model, the table shows the layers
that an adapter can target.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from ..core.collection import collection_off
from . import _options
from ._graphs import graph_in, is_graphs
from ._modules import FEW, HINT, by_module, in_order, layers_of, ranges, span
from ._render import TextTable, View, counted, show, size

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue


@click.command(help=__doc__)
@click.argument("src")
@click.option("--base-weights", metavar="DIR", help="For a graph: weights of its base, to find layers by their values.")
@click.option(
    "--all", "every", is_flag=True,
    help="List every target or tensor. Without it, more than 24 are summarized, one row for each module.",
)  # fmt: skip
@click.option("--layers", is_flag=True, help="Show how much the adapter changes each layer; this reads all values.")
@_options.reading
@_options.rename
@_options.flags
@click.pass_obj
@collection_off()
def command(
    settings: _options.CliSettings, src: str, source_format: str | None, base: str | None, compat: str | None,
    base_weights: str | None, rename: tuple[str, ...], every: bool, layers: bool,
) -> None:  # fmt: skip
    """Run `adapterkit.inspect`."""
    from ..api import inspect

    graph = graph_in(src) or is_graphs(src, None)
    if graph is None or graph != src:
        if base_weights is not None and graph is None:
            raise click.UsageError("--base-weights is only for ONNX models; for an adapter, type --base")
        if rename and base is None:
            raise click.UsageError("--rename requires --base")
    found = inspect(
        src, format=source_format, base=base, compat=compat, layers=layers, rename=rename, base_weights=base_weights,
        **_options.stated(),
    )  # fmt: skip
    show(settings, found.record(), partial(_view, every=every))


def _view(record: Mapping[str, object], every: bool) -> View:
    """Yield the lines and tables for an adapter, a base or a graph."""
    if record["kind"] == "graph":
        return _graph_view(record, every)
    if record["kind"] == "base":
        return _base_view(record, every)
    return _adapter_view(record, every) if "updates" in record else _unresolved_view(record)


def _unresolved_view(record: Mapping[str, Any]) -> View:
    yield f"{record['path']}: an adapter whose targets are not resolved"
    rows = [
        [module, " ".join(f"{s}{shape}" for s, shape in slots.items())] for module, slots in record["modules"].items()
    ]
    yield TextTable(("module", "tensors"), rows)
    yield record["why"]


SPARE = ("dtype", "parameters", "other", "shapes", "layout", "scaling", "targets")
"""Columns that are dropped on a narrow terminal, in this order."""


def _adapter_view(record: Mapping[str, Any], every: bool) -> View:
    totals, base = record["totals"], record["base"] or {}
    yield f"{record['path']}: adapter in format {record['format']}" + (f", for {base['id']}" if base.get("id") else "")
    groups = _groups(record["updates"])
    yield from _aligned_pairs(_story(record, groups))
    if "layers" in record:
        yield TextTable(
            ("layer", "targets", "norm", "share", "largest", "note"),
            [[each["layer"] or "(none)", each["targets"], each["norm"],
              None if each["share"] is None else f"{each['share']:.1%}", each["largest"], each["why"]]
             for each in record["layers"]],
        )  # fmt: skip
    elif every or totals["targets"] <= FEW:
        columns = ("target", "layout", "method", "shapes", "rank", "scaling", "other", "dtype", "parameters")
        yield TextTable(columns, _update_rows(in_order(record["updates"])), SPARE)
    else:
        headings = ("module", "targets", "layers", "layout", "method", "shapes", "rank", "scaling", "other", "dtype")
        yield TextTable((*headings, "parameters"), [group.row() for group in groups], SPARE)
    if record["families"]:
        yield f"family: {' or '.join(record['families'])}"
    if "values" in record:
        yield f"the values cannot be read without the base: {record['values']}; type --base BASE"
    if record["without_alpha"]:
        yield f"{counted(record['without_alpha'], 'module')} without alpha: the scaling is 1"
    yield from (f"{key}: {_short(value)}" for key, value in record["metadata"].items() if key not in _LONG)
    if "loaders" in record:
        named = {
            word: [each["title"] for each in record["loaders"] if each["loads"] == word] for word in ("yes", "part")
        }
        yield f"loaded without conversion by: {', '.join(named['yes']) or 'no known tool'}"
        if named["part"]:
            yield f"loaded in part by: {', '.join(named['part'])}"
        again = f"adapterkit list loaders {quote(record['path'])}"
        yield f"'{again}' says which tools load it after a conversion, and why others do not"
    if record["unknown_fields"]:
        yield f"fields that the format does not define (kept): {', '.join(record['unknown_fields'])}"
    for step in record["recipe"]:
        if "subfolder" in step["args"]:
            yield f"read from the subfolder {step['args']['subfolder']}, the only adapter in the folder"
    names = record.get("names")
    if names:
        used = "; ".join(f"{each['rule']} ({each['targets']:,})" for each in names.get("rules", ()))
        yield f"names in the base: {used}" if names["fits"] else f"does not fit the base: {names['why']}"
    yield from (f"warning: {warning}" for warning in record.get("warnings", ()))
    if totals["targets"] > FEW and not every and "layers" not in record:
        yield "--all lists every target, --layers shows how much each layer is changed"


def _story(record: Mapping[str, Any], groups: Sequence[_Group]) -> Iterable[tuple[str, str]]:
    """Yield (name, value) for each line of an adapter's summary."""
    totals = record["totals"]
    yield "method", ", ".join(f"{name} ({count:,})" for name, count in totals["methods"].items())
    ranks = sorted({each["rank"] for each in record["updates"] if isinstance(each["rank"], int)})
    if ranks:
        yield "rank", ", ".join(map(str, ranks[:8])) + (f", ... {ranks[-1]}" if ranks[8:] else "")
    layers = {layer for group in groups for layer in group.layers if layer}
    where = f" in {counted(len(layers), 'layer')}" if layers else ""
    yield "targets", f"{totals['targets']:,}{where}"
    yield "size", f"{_amounts(totals)}, {', '.join(totals['dtypes'])}"
    if record.get("licence"):
        yield "licence", _licence(record)
    if record.get("triggers"):
        yield "trigger words", _short(", ".join(record["triggers"]))
    steps = [step["op"] for step in record["recipe"]]
    if steps and steps != ["read"]:
        yield "lineage", " -> ".join(_step(step) for step in record["recipe"])


def _step(step: Mapping[str, Any]) -> str:
    of = step["args"].get("of")
    told = step["args"].get("method") or step["args"].get("format")
    many = f" of {len(of)} adapters" if isinstance(of, list) else ""
    return f"{step['op']}" + (f" ({told})" if told else "") + many


def _aligned_pairs(pairs: Iterable[tuple[str, str]]) -> Iterable[str]:
    found = [*pairs]
    width = max((len(key) for key, _ in found), default=0)
    return (f"  {key.ljust(width)}  {value}" for key, value in found)


class _Group:
    """Targets of one module that differ only in their layer."""

    def __init__(self, module: str, first: Mapping[str, object]) -> None:
        self.module, self.first, self.layers, self.parameters, self.count = module, first, dict[str, None](), 0, 0

    def add(self, update: Mapping[str, Any], layer: str) -> None:
        self.layers[layer] = None
        self.parameters += update["parameters"]
        self.count += 1

    def row(self) -> list[Any]:
        _, layout, method, shapes, rank, scaling, other, dtypes, _ = _update_row(self.first)
        where = ranges([layer for layer in self.layers if layer])
        return [
            self.module, self.count, where, layout, method, shapes, rank, scaling, other, dtypes, self.parameters
        ]  # fmt: skip


def _groups(updates: Sequence[Mapping[str, Any]]) -> list[_Group]:
    from ..reporting.grid import cells, reading_order

    where = cells(update["target"] for update in updates)
    found: dict[Any, _Group] = {}
    ranks = {order: rank for rank, order in enumerate(sorted({cell.order for cell in where.values()}))}
    ordered = sorted(updates, key=lambda update: ranks[where[update["target"]].order])
    for update in ordered:
        cell = where[update["target"]]
        rows = update["rows"] and tuple(update["rows"])
        key = cell.module, id(update["tensors"]), rows
        if key not in found:
            name = (cell.module or "(model)") + (f"[{rows[0]}:{rows[1]}]" if rows else "")
            found[key] = _Group(name, update)
        found[key].add(update, cell.layer)
    return sorted(found.values(), key=lambda group: reading_order(group.module))


_LONG = (
    "format",
    "adapterkit.family",
    "modelspec.thumbnail",
    "ss_tag_frequency",
    "ss_bucket_info",
    "ss_dataset_dirs",
    "ss_datasets",
)
"""Metadata keys that only --json shows: their values are pictures or tables, or are shown elsewhere."""


def _short(value: str) -> str:
    return value if len(value) <= 200 else f"{value[:200]}... ({len(value):,} characters, --json shows all)"


def _update_rows(updates: Sequence[Mapping[str, object]]) -> list[list[Any]]:
    """Return the rows of the table of updates. Updates that differ only in their names are formatted once."""
    known: dict[int, list[Any]] = {}
    found = []
    for update in updates:
        row = known.get(id(update["tensors"]))
        if row is None:
            row = known[id(update["tensors"])] = _update_row(update)
        found.append([_named(update), *row[1:]])
    return found


def _named(update: Mapping[str, Any]) -> str:
    rows = f"[{update['rows'][0]}:{update['rows'][1]}]" if update["rows"] else ""
    return (update["target"] or "(model)") + rows


def _update_row(update: Mapping[str, Any]) -> list[object]:
    layout = "" if update["layout"] == "out *in" else update["layout"]
    shapes = " ".join(f"{name}{_shape(tensor)}" for name, tensor in update["tensors"].items())
    other = " ".join(f"{k}={v}" for k, v in update["attributes"].items() if k != "scaling" and v is not None)
    dtypes = ", ".join(sorted({tensor["dtype"] for tensor in update["tensors"].values()}))
    scaling = update["attributes"].get("scaling")
    return [
        _named(update), layout, update["method"], shapes, update["rank"], scaling, other,
        dtypes, update["parameters"],
    ]  # fmt: skip


def _licence(record: Mapping[str, JsonValue]) -> str:
    asks = record.get("licence_asks")
    return str(record["licence"]) + (f", which {asks}" if asks else "")


def _base_view(record: Mapping[str, Any], every: bool) -> View:
    totals = record["totals"]
    yield f"{record['path']}: base" + (f", model_type {record['model_type']}" if record["model_type"] else "")
    files = counted(len(record["files"]), "file")
    yield f"  {counted(totals['tensors'], 'tensor')} in {files}, {_amounts(totals)}"
    if record.get("architecture"):
        yield f"  GGUF of {record['architecture']}" + (f": {record['name']}" if record.get("name") else "")
    if packed := record.get("quantized"):
        yield "  " + _packed(packed)
    if record.get("families"):
        yield f"  family: {' or '.join(record['families'])}"
    if record.get("licence"):
        yield f"  licence {_licence(record)}"
    yield from (f"warning: {warning}" for warning in record.get("warnings", ()))
    if every or len(record["tensors"]) <= FEW:
        columns = ("tensor", "shape", "dtype", "parameters", "bytes")
        yield TextTable(
            columns, [[t["name"], _shape(t), t["dtype"], t["parameters"], t["bytes"]] for t in record["tensors"]]
        )  # fmt: skip
    else:
        headings = ("tensors", "count", "layers", "shape", "dtype", "parameters")
        yield TextTable(headings, _tensor_groups(record["tensors"]), ("dtype", "parameters", "count"))
    counts = [[dtype, n["tensors"], n["parameters"], n["bytes"]] for dtype, n in totals["dtypes"].items()]
    yield TextTable(("dtype", "tensors", "parameters", "bytes"), counts)
    if len(record["tensors"]) > FEW and not every:
        yield "--all lists every tensor"


def _packed(quantized: Mapping[str, Any]) -> str:
    """Return the scheme of a quantized base and its number of parameters before quantization."""
    if quantized["scheme"] is None:
        return f"quantized in an unsupported way: {quantized['why']}"
    weights = counted(quantized["weights"], "weight")
    return f"quantized: {quantized['scheme']}, {weights}; {counted(quantized['parameters'], 'parameter')} in all"


def _tensor_groups(tensors: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Return one row for each group of tensors that differ only in their layer."""
    from ..reporting.grid import cells

    where = cells(tensor["name"] for tensor in tensors)
    found: dict[Any, list[Any]] = {}
    layers: dict[Any, dict[str, None]] = {}
    for tensor in sorted(tensors, key=lambda each: where[each["name"]].order):
        cell = where[tensor["name"]]
        key = cell.module, tuple(tensor["shape"]), tensor["dtype"]
        row = found.setdefault(key, [cell.module, 0, "", _shape(tensor), tensor["dtype"], 0])
        row[1] += 1
        row[5] += tensor["parameters"]
        layers.setdefault(key, {})[cell.layer] = None
    for key, row in found.items():
        row[2] = ranges([layer for layer in layers[key] if layer])
    return [*found.values()]


def _graph_view(record: Mapping[str, Any], every: bool) -> View:
    places = record["layers"]
    within = "graphs" in record
    if within:
        yield f"{record['path']}: {counted(len(record['graphs']), 'graph')}"
        named = [[each["name"], each["part"] or "", each["layers"]] for each in record["graphs"]]
        yield TextTable(("graph", "part", "layers"), named)
    else:
        yield f"{record['path']}: graph"
    if every or len(places) <= FEW:
        columns = ("target", "shape", "node", "value", "found by", "confidence")
        rows = [[*([place["graph"]] if within else []), *_layer_row(place)] for place in places]
        yield TextTable((*(["graph"] if within else []), *columns), rows)
    else:
        headings = ("module", "targets", "layers", "shape", "node of the first", "found by", "confidence")
        yield TextTable(headings, [_places_row(*group) for group in by_module(places)], ("node of the first", "shape"))
    yield _layer_counts(record)
    if len(places) > FEW and not every:
        yield HINT


def _places_row(module: str, group: Sequence[Mapping[str, Any]], layers: Mapping[str, str]) -> list[object]:
    """Return the row of a module in a graph; values that differ between its layers are listed or shown as a range."""
    rows = [_layer_row(place) for place in group]
    shapes, found = ([*dict.fromkeys(str(row[at]) for row in rows)] for at in (1, 4))
    confidence = span([row[5] for row in rows if row[5]])
    return [module, len(rows), layers_of(group, layers), " ".join(shapes[:2]), rows[0][2], ", ".join(found), confidence]


def _layer_counts(record: Mapping[str, Any]) -> str:
    methods = ", ".join(f"{count} by {method}" for method, count in record["totals"]["methods"].items())
    return f"{counted(record['totals']['layers'], 'layer')} ({methods})"


def _layer_row(place: Mapping[str, Any]) -> list[object]:
    nodes, found = place["nodes"], place["method"]
    shown = nodes[0] + (f" and {len(nodes) - 1} more" if len(nodes) > 1 else "") if nodes else place["note"]
    shape = "" if place["shape"] is None else _shape(place)
    values = ", ".join(place["values"])
    return [place["target"] or "?", shape, shown, values, found or "", f"{place['confidence']:.4f}" if found else ""]


def _amounts(totals: Mapping[str, Any]) -> str:
    return f"{counted(totals['parameters'], 'parameter')}, {size(totals['bytes'])}"


def _shape(tensor: Mapping[str, Any]) -> str:
    return f"[{','.join(map(str, tensor['shape']))}]"
