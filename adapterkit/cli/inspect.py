"""Show the contents of an adapter, a base or a graph.

SRC is an adapter in any known format, a base (a folder of weights or one weight file), or an ONNX model, on disk or on
a hub (hf://org/repo). Only file headers are read, except with --layers. For an ONNX model, the table shows the layers
that an adapter can target.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from shlex import quote

import click

from ..core.adapter import collection_off
from . import _options
from ._graphs import graph_in, is_graphs
from ._render import (
    FEW,
    HINT,
    TextTable,
    View,
    by_module,
    counted,
    in_order,
    integer,
    layers_of,
    number,
    part,
    part_or_none,
    parts,
    ranges,
    show,
    size,
    span,
    texts,
)


@click.command(help=__doc__)
@click.argument("src")
@click.option(
    "--base-weights", metavar="DIR",
    help="For a graph: folder with the weights of its base. With them, layers are also found if the graph has lost the "
    "layers' names.",
)  # fmt: skip
@click.option(
    "--all", "every", is_flag=True,
    help="List every target or tensor. By default, if there are more than 24, the table has one row per module.",
)  # fmt: skip
@click.option("--layers", is_flag=True, help="Show how much the adapter changes each layer. This reads all tensors.")
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
    inspection = inspect(
        src, format=source_format, base=base, compat=compat, layers=layers, rename=rename, base_weights=base_weights,
        **_options.stated(),
    )  # fmt: skip
    show(settings, inspection.record(), partial(_view, every=every))


def _view(record: Mapping[str, object], every: bool) -> View:
    """Yield the lines and tables for an adapter, a base or a graph."""
    if record["kind"] == "graph":
        return _graph_view(record, every)
    if record["kind"] == "base":
        return _base_view(record, every)
    return _adapter_view(record, every) if "updates" in record else _unresolved_view(record)


def _unresolved_view(record: Mapping[str, object]) -> View:
    yield f"{record['path']}: an adapter whose targets are not resolved"
    modules = part(record, "modules")
    rows = [[module, " ".join(f"{s}{shape}" for s, shape in part(modules, module).items())] for module in modules]
    yield TextTable(("module", "tensors"), rows)
    yield str(record["why"])


SPARE = ("dtype", "parameters", "other", "shapes", "layout", "scaling", "targets")
"""Columns that are dropped on a narrow terminal; the first is dropped first."""


def _adapter_view(record: Mapping[str, object], every: bool) -> View:
    base, many = part_or_none(record, "base") or {}, integer(part(record, "totals"), "targets") > FEW
    yield f"{record['path']}: adapter in format {record['format']}" + (f", for {base['id']}" if base.get("id") else "")
    groups = _groups(parts(record, "updates"))
    yield from _aligned_pairs(_story(record, groups))
    if "layers" in record:
        yield TextTable(
            ("layer", "targets", "norm", "share", "largest", "note"),
            [[each["layer"] or "(none)", each["targets"], each["norm"],
              None if each["share"] is None else f"{number(each, 'share'):.1%}", each["largest"], each["why"]]
             for each in parts(record, "layers")],
        )  # fmt: skip
    elif every or not many:
        columns = ("target", "layout", "method", "shapes", "rank", "scaling", "other", "dtype", "parameters")
        yield TextTable(columns, _update_rows(in_order(parts(record, "updates"))), SPARE)
    else:
        headings = ("module", "targets", "layers", "layout", "method", "shapes", "rank", "scaling", "other", "dtype")
        yield TextTable((*headings, "parameters"), [group.row() for group in groups], SPARE)
    if record["families"]:
        yield f"family: {' or '.join(texts(record, 'families'))}"
    if "values" in record:
        yield f"the values cannot be read without the base: {record['values']}; type --base BASE"
    if record["without_alpha"]:
        yield f"{counted(integer(record, 'without_alpha'), 'module')} without alpha: the scaling is 1"
    yield from (
        f"{key}: {_short(str(value))}" for key, value in part(record, "metadata").items() if key not in _LONG
    )  # fmt: skip
    if "loaders" in record:
        named = {
            word: [str(each["title"]) for each in parts(record, "loaders") if each["loads"] == word]
            for word in ("yes", "part")
        }
        yield f"loaded without conversion by: {', '.join(named['yes']) or 'no known tool'}"
        if named["part"]:
            yield f"loaded in part by: {', '.join(named['part'])}"
        again = f"adapterkit list loaders {quote(str(record['path']))}"
        yield f"'{again}' shows which tools load the adapter after a conversion, and why other tools do not"
    if record["unknown_fields"]:
        yield f"fields that the format does not define (kept): {', '.join(texts(record, 'unknown_fields'))}"
    for args in (part(step, "args") for step in parts(record, "recipe")):
        if "subfolder" in args:
            yield f"read from the subfolder {args['subfolder']}, because the folder has no other adapter"
    names = part_or_none(record, "names")
    if names:
        used = "; ".join(f"{each['rule']} ({integer(each, 'targets'):,})" for each in parts(names, "rules"))
        yield f"names in the base: {used}" if names["fits"] else f"does not fit the base: {names['why']}"
    yield from (f"warning: {warning}" for warning in texts(record, "warnings"))
    if many and not every and "layers" not in record:
        yield "--all lists every target, --layers shows how much each layer is changed"


def _story(record: Mapping[str, object], groups: Sequence[_ModuleRows]) -> Iterable[tuple[str, str]]:
    """Yield (name, value) for each line of an adapter's summary."""
    totals = part(record, "totals")
    methods = part(totals, "methods")
    yield "method", ", ".join(f"{name} ({integer(methods, name):,})" for name in methods)
    ranks = sorted({each["rank"] for each in parts(record, "updates") if isinstance(each["rank"], int)})
    if ranks:
        yield "rank", ", ".join(map(str, ranks[:8])) + (f", ... {ranks[-1]}" if ranks[8:] else "")
    layers = {layer for group in groups for layer in group.layers if layer}
    where = f" in {counted(len(layers), 'layer')}" if layers else ""
    yield "targets", f"{integer(totals, 'targets'):,}{where}"
    yield "size", f"{_amounts(totals)}, {', '.join(texts(totals, 'dtypes'))}"
    if record.get("licence"):
        yield "licence", _licence(record)
    if record.get("triggers"):
        yield "trigger words", _short(", ".join(texts(record, "triggers")))
    steps = parts(record, "recipe")
    if steps and [step["op"] for step in steps] != ["read"]:
        yield "lineage", " -> ".join(_step(step) for step in steps)


def _step(step: Mapping[str, object]) -> str:
    args = part(step, "args")
    of = args.get("of")
    detail = args.get("method") or args.get("format")
    many = f" of {len(of)} adapters" if isinstance(of, list) else ""
    return f"{step['op']}" + (f" ({detail})" if detail else "") + many


def _aligned_pairs(pairs: Iterable[tuple[str, str]]) -> Iterable[str]:
    rows = [*pairs]
    width = max((len(key) for key, _ in rows), default=0)
    return (f"  {key.ljust(width)}  {value}" for key, value in rows)


class _ModuleRows:
    """The updates of one module that share a row of the table, because they differ only in their targets' names."""

    def __init__(self, module: str, first: Mapping[str, object]) -> None:
        self.module, self.first, self.layers, self.parameters, self.count = module, first, dict[str, None](), 0, 0

    def add(self, update: Mapping[str, object], layer: str) -> None:
        self.layers[layer] = None
        self.parameters += integer(update, "parameters")
        self.count += 1

    def row(self) -> list[object]:
        _, layout, method, shapes, rank, scaling, other, dtypes, _ = _update_row(self.first)
        where = ranges([layer for layer in self.layers if layer])
        return [
            self.module, self.count, where, layout, method, shapes, rank, scaling, other, dtypes, self.parameters
        ]  # fmt: skip


def _groups(updates: Sequence[Mapping[str, object]]) -> list[_ModuleRows]:
    from ..reporting.grid import cells, reading_order

    where = cells(str(update["target"]) for update in updates)
    groups: dict[tuple[str, int, str], _ModuleRows] = {}
    ranks = {order: rank for rank, order in enumerate(sorted({cell.order for cell in where.values()}))}
    ordered = sorted(updates, key=lambda update: ranks[where[str(update["target"])].order])
    for update in ordered:
        cell = where[str(update["target"])]
        key = cell.module, id(update["tensors"]), _rows(update)
        if key not in groups:
            groups[key] = _ModuleRows((cell.module or "(model)") + _rows(update), update)
        groups[key].add(update, cell.layer)
    return sorted(groups.values(), key=lambda group: reading_order(group.module))


_LONG = (
    "format",
    "adapterkit.family",
    "modelspec.thumbnail",
    "ss_tag_frequency",
    "ss_bucket_info",
    "ss_dataset_dirs",
    "ss_datasets",
)
"""Metadata keys that are shown only with --json: pictures, tables, and values that another line already shows."""


def _short(value: str) -> str:
    return value if len(value) <= 200 else f"{value[:200]}... ({len(value):,} characters, --json shows all)"


def _update_rows(updates: Sequence[Mapping[str, object]]) -> list[list[object]]:
    """Return the rows of the table of updates. Updates that differ only in the target's name are formatted once."""
    known: dict[int, list[object]] = {}
    rows = []
    for update in updates:
        row = known.get(id(update["tensors"]))
        if row is None:
            row = known[id(update["tensors"])] = _update_row(update)
        rows.append([_named(update), *row[1:]])
    return rows


def _rows(update: Mapping[str, object]) -> str:
    return f"[{':'.join(texts(update, 'rows'))}]" if update["rows"] else ""


def _named(update: Mapping[str, object]) -> str:
    return str(update["target"] or "(model)") + _rows(update)


def _update_row(update: Mapping[str, object]) -> list[object]:
    layout = "" if update["layout"] == "out *in" else update["layout"]
    tensors, attributes = part(update, "tensors"), part(update, "attributes")
    shapes = " ".join(f"{name}{_shape(part(tensors, name))}" for name in tensors)
    other = " ".join(f"{k}={v}" for k, v in attributes.items() if k != "scaling" and v is not None)
    dtypes = ", ".join(sorted({str(part(tensors, name)["dtype"]) for name in tensors}))
    scaling = attributes.get("scaling")
    return [
        _named(update), layout, update["method"], shapes, update["rank"], scaling, other,
        dtypes, update["parameters"],
    ]  # fmt: skip


def _licence(record: Mapping[str, object]) -> str:
    asks = record.get("licence_asks")
    return str(record["licence"]) + (f", which {asks}" if asks else "")


def _base_view(record: Mapping[str, object], every: bool) -> View:
    totals, tensors = part(record, "totals"), parts(record, "tensors")
    yield f"{record['path']}: base" + (f", model_type {record['model_type']}" if record["model_type"] else "")
    files = counted(len(texts(record, "files")), "file")
    yield f"  {counted(integer(totals, 'tensors'), 'tensor')} in {files}, {_amounts(totals)}"
    if record.get("architecture"):
        yield f"  GGUF, architecture {record['architecture']}" + (f": {record['name']}" if record.get("name") else "")
    if packed := part_or_none(record, "quantized"):
        yield "  " + _packed(packed)
    if record.get("families"):
        yield f"  family: {' or '.join(texts(record, 'families'))}"
    if record.get("licence"):
        yield f"  licence {_licence(record)}"
    yield from (f"warning: {warning}" for warning in texts(record, "warnings"))
    if every or len(tensors) <= FEW:
        columns = ("tensor", "shape", "dtype", "parameters", "bytes")
        yield TextTable(columns, [[t["name"], _shape(t), t["dtype"], t["parameters"], t["bytes"]] for t in tensors])
    else:
        headings = ("tensors", "count", "layers", "shape", "dtype", "parameters")
        yield TextTable(headings, _tensor_groups(tensors), ("dtype", "parameters", "count"))
    dtypes = part(totals, "dtypes")
    sums = [(dtype, part(dtypes, dtype)) for dtype in dtypes]
    counts = [[dtype, n["tensors"], n["parameters"], n["bytes"]] for dtype, n in sums]
    yield TextTable(("dtype", "tensors", "parameters", "bytes"), counts)
    if len(tensors) > FEW and not every:
        yield "--all lists every tensor"


def _packed(quantized: Mapping[str, object]) -> str:
    """Return a line with a base's quantization scheme and its number of quantized weights.

    The line also has the number of parameters before quantization.
    """
    if quantized["scheme"] is None:
        return f"quantized in an unsupported way: {quantized['why']}"
    weights = counted(integer(quantized, "weights"), "weight")
    parameters = counted(integer(quantized, "parameters"), "parameter")
    return f"quantized: {quantized['scheme']}, {weights}; {parameters} in all"


def _tensor_groups(tensors: Sequence[Mapping[str, object]]) -> list[list[object]]:
    """Return one row per combination of module, shape and dtype. Each row covers the tensors of all layers."""
    from ..reporting.grid import cells

    where = cells(str(tensor["name"]) for tensor in tensors)
    groups: dict[tuple[str, str, str], list[Mapping[str, object]]] = {}
    for tensor in sorted(tensors, key=lambda each: where[str(each["name"])].order):
        key = where[str(tensor["name"])].module, _shape(tensor), str(tensor["dtype"])
        groups.setdefault(key, []).append(tensor)
    rows: list[list[object]] = []
    for (module, shape, dtype), group in groups.items():
        layers = dict.fromkeys(where[str(tensor["name"])].layer for tensor in group)
        parameters = sum(integer(tensor, "parameters") for tensor in group)
        rows.append([module, len(group), ranges([layer for layer in layers if layer]), shape, dtype, parameters])
    return rows


def _graph_view(record: Mapping[str, object], every: bool) -> View:
    places = parts(record, "layers")
    within = "graphs" in record
    if within:
        graphs = parts(record, "graphs")
        yield f"{record['path']}: {counted(len(graphs), 'graph')}"
        named = [[each["name"], each["part"] or "", each["layers"]] for each in graphs]
        yield TextTable(("graph", "part", "layers"), named)
    else:
        yield f"{record['path']}: graph"
    if every or len(places) <= FEW:
        columns = ("target", "shape", "node", "value", "found by", "confidence")
        rows = [[*([place["graph"]] if within else []), *_layer_row(place)] for place in places]
        yield TextTable((*(["graph"] if within else []), *columns), rows)
    else:
        headings = ("module", "targets", "layers", "shape", "first node", "found by", "confidence")
        yield TextTable(headings, [_places_row(*group) for group in by_module(places)], ("first node", "shape"))
    totals = part(record, "totals")
    methods = ", ".join(f"{count} by {method}" for method, count in part(totals, "methods").items())
    yield f"{counted(integer(totals, 'layers'), 'layer')} ({methods})"
    if len(places) > FEW and not every:
        yield HINT


def _places_row(module: str, group: Sequence[Mapping[str, object]], layers: Mapping[str, str]) -> list[object]:
    """Return the table row of one module.

    If the layers differ, the row has the first layer's node, at most two shapes, all methods that found the layers, and
    the range of the confidences.
    """
    rows = [_layer_row(place) for place in group]
    shapes, methods = ([*dict.fromkeys(str(row[at]) for row in rows)] for at in (1, 4))
    confidence = span([row[5] for row in rows if row[5]])
    return [
        module,
        len(rows),
        layers_of(group, layers),
        " ".join(shapes[:2]),
        rows[0][2],
        ", ".join(methods),
        confidence,
    ]


def _layer_row(place: Mapping[str, object]) -> list[object]:
    nodes, method = texts(place, "nodes"), place["method"]
    shown = nodes[0] + (f" and {len(nodes) - 1} more" if len(nodes) > 1 else "") if nodes else place["note"]
    shape = "" if place["shape"] is None else _shape(place)
    confidence = f"{number(place, 'confidence'):.4f}" if method else ""
    return [place["target"] or "?", shape, shown, ", ".join(texts(place, "values")), method or "", confidence]


def _amounts(totals: Mapping[str, object]) -> str:
    return f"{counted(integer(totals, 'parameters'), 'parameter')}, {size(integer(totals, 'bytes'))}"


def _shape(tensor: Mapping[str, object]) -> str:
    return f"[{','.join(texts(tensor, 'shape'))}]"
