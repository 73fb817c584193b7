"""The command `merge` for a base that is an ONNX graph, and lines about the error of requantizing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from . import _modules
from ._options import CliSettings
from ._render import TextTable, View, counted, show
from ._writing import is_done, made_from, refuse_place

MOST_SHOWN = 8
"""Targets whose damage is printed; all are in the record."""


def damage_lines(damage: Mapping[str, Mapping[str, float]], beside: Sequence[str] = ()) -> Iterator[str]:
    """Show the error of quantizing again, target by target, the worst first, and what was kept beside instead."""
    apart = set(beside)
    rounded = {name: told for name, told in damage.items() if name not in apart}
    worst = sorted(rounded, key=lambda name: rounded[name]["kept"])
    for name in worst[:MOST_SHOWN]:
        yield f"{name}: error {rounded[name]['error']:.3%}, {rounded[name]['kept']:.1%} of the change left"
    if worst[MOST_SHOWN:]:
        kept = rounded[worst[len(worst) // 2]]["kept"]
        yield f"and {counted(len(worst) - MOST_SHOWN, 'target')} more; in the middle {kept:.1%} of the change is left"
    if beside:
        tried = [damage[name]["kept"] for name in beside if name in damage]
        why = f": quantizing again would leave {min(tried):.1%} to {max(tried):.1%} of it" if tried else ""
        yield f"{counted(len(beside), 'change')} kept beside the quantized weight, as factors of floating point{why}"


# The command `merge` for a base that is an ONNX graph.


ONLY_FOLDERS = {
    "method": "Combine the adapters first (adapterkit combine), and merge the result",
    "dtype": "Export the model in that type instead", "device": "A graph is merged on the CPU",
    "shard_size": "A graph's numbers go into one file", "engine": "A graph is merged on this machine",
    "address": "A graph is merged on this machine", "nodes": "A graph is merged on this machine",
    "bandwidth": "A graph is merged on this machine", "price": "A graph is merged on this machine",
    "node_tasks": "A graph is merged on this machine",
    "onto": "Export the 16-bit weights and merge into that graph",
    "seed": "A graph is rounded to the nearest", "memory": "A graph is merged in blocks as it is",
    "link": "A graph's numbers are written anew", "stream": "Fetch the graph first",
    "parameters": "--set is of a --method",
    "checksums": "A graph gets no sums", "tokenizer": "Copy the tokenizer beside the graph",
    "verified": "The result is run and compared anyway; --no-check leaves that out",
    "keep": "A graph rounds to the nearest: merge into the folder of weights, and export the result",
    "remainder": "A graph has no remainder: merge into the folder of weights, and export the result",
    "strict_licence": "A graph has no card: inspect shows the licences of base and adapters",
}  # fmt: skip
"""Options of folders of weights alone, by parameter -> what to do instead for a graph."""

ONLY_GRAPHS = ("base_weights", "keep_change", "check")
"""Options of graphs alone."""


def graph_in(base: str) -> str | None:
    """Return the ONNX file that a name means; see `reporting.inspecting.graph_file`."""
    from ..reporting.inspecting import graph_file

    return graph_file(base)


def graph_or_folder(model: str, out: str | None) -> str:
    """Return what a name means beside an output: the only graph of a folder for a file, the folder for a folder."""
    from ..reporting.inspecting import graph_folder

    if out is not None and not out.lower().endswith(".onnx") and graph_folder(model) is not None:
        return model
    return graph_in(model) or model


def is_graphs(base: str, out: str | None) -> str | None:
    """Return the graph or the folder of graphs that a base is; None for a base of weights."""
    from ..reporting.inspecting import graph_folder

    found = graph_or_folder(base, out)
    return found if found.lower().endswith(".onnx") or graph_folder(found) is not None else None


def given(ctx: click.Context, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(parameter, option) of those of some options that the command line names."""
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            yield parameter.name or "", parameter.opts[0]


def merge_graph(
    ctx: click.Context, model: str, adapters: Sequence[Any], out: str | None, weights: Sequence[float],
    base_weights: str | None, quantized: str | None, keep_change: str | None, tied: str | None, strict_base: bool,
    check: bool, overwrite: bool, only_plan: bool, rename: Sequence[str], allow_partial: bool,
) -> None:  # fmt: skip
    """Runs `adapterkit.onnx.merge`, or `adapterkit.onnx.plan`."""
    from ..errors import UsageError

    for name, option in given(ctx, tuple(ONLY_FOLDERS)):
        raise UsageError(f"{option} is not for an ONNX graph", path=model, cure=ONLY_FOLDERS[name])
    if quantized == "original":
        raise UsageError("--quantized original is not for an ONNX graph", path=model, cure=ONLY_FOLDERS["onto"])
    settings: CliSettings = ctx.obj
    chosen = list(weights) or None
    if only_plan:
        from ..onnx import plan

        found = plan(
            model, adapters, weights=chosen, base_weights=base_weights, tied=tied, strict_base=strict_base,
            rename=rename, allow_partial=allow_partial,
        )  # fmt: skip
        show(settings, {"base": model, "targets": [place.record() for place in found]}, _plan_view)
        return
    if out is None:
        raise click.UsageError("Missing option '-o' / '--out'")
    refuse_place(out)
    decided, read = decided_by(model, [*ctx.params["adapters"], base_weights])
    if is_done(settings, out, decided, overwrite):
        return
    free(out, overwrite, read)
    from ..onnx import merge

    report = merge(
        model, adapters, out, weights=chosen, base_weights=base_weights, quantized=quantized,
        keep_change=keep_change, tied=tied, strict_base=strict_base, rename=rename,
        allow_partial=allow_partial, check=check, overwrite=overwrite, made_from=decided,
    )  # fmt: skip
    warn(report.warnings)
    show(settings, report.record(), _merged_view)


def decided_by(model: str, sources: Sequence[str | None]) -> tuple[str, list[Path]]:
    """A digest of what decides the graph that a command writes, see `made_from`; and the files that are read.

    Args:
        model: the graph that is read.
        sources: adapters and bases that are read.
    """
    from ..formats import files_read
    from ..io.locations import located
    from ..onnx.folders import files_of_folder
    from ..onnx.model_file import opened

    if Path(model).is_dir():
        files = files_of_folder(Path(model))
    else:
        source = opened(model)
        files = [] if source.path is None else [source.path, *source.data]
        beside = [] if source.path is None else [source.path.parent / "config.json"]
        files += [file for file in beside if file.is_file()]  # It tells whether head and embedding are tied.
    files += [file for path in sources if path is not None for file in files_read(located(path))]
    return made_from(files, ("onnx", "onnx-ir", "numpy")), files


def free(out: str, overwrite: bool, read: Sequence[Path]) -> None:
    """Refuse, before any work, a place that is taken or read; remove first what a killed run left there."""
    from ..io.staging import check_free, check_inputs, take_over

    take_over(Path(out))
    check_inputs([Path(out)], read)
    check_free(Path(out), overwrite)


def refuse_graph_options(ctx: click.Context, base: str) -> None:
    """Refuses options of graphs where the base is a folder.

    Raises:
        UsageError: there is one.
    """
    refuse(ctx, ONLY_GRAPHS, "is for an ONNX graph", base, "Name a .onnx file, or leave it out")


def refuse(
    ctx: click.Context, names: Sequence[str], why: str, path: str | None = None, cure: str = "Leave it out"
) -> None:
    """Refuses some options where the command line names one.

    Raises:
        UsageError: it does.
    """
    from ..errors import UsageError

    for _, option in given(ctx, names):
        raise UsageError(f"{option} {why}", path=path, cure=cure)


def warn(warnings: Sequence[str]) -> None:
    """Print what a report warns of to stderr; `--json` has it in the record as well."""
    for line in warnings:
        click.echo(f"warning: {line}", err=True)


def targets_view(record: Mapping[str, Any], every: bool = False) -> View:
    """Show the nodes of each target in a graph, or one row a module."""
    targets = _modules.in_order(record["targets"])
    if every or len(targets) <= _modules.FEW:
        rows = [[t["target"], ", ".join(t["nodes"]), t["method"], f"{t['confidence']:.2f}"] for t in targets]
        columns: tuple[str, ...] = ("target", "node", "found by", "confidence")
        if "graphs" in record:
            columns, rows = ("graph", *columns), [[t["graph"], *row] for t, row in zip(targets, rows, strict=True)]
        yield TextTable(columns, rows)
        return
    groups = _modules.by_module(targets)
    rows = [
        [
            module, len(group), _modules.layers_of(group, layers), ", ".join(dict.fromkeys(t["method"] for t in group)),
            _modules.span([f"{t['confidence']:.2f}" for t in group]),
        ]
        for module, group, layers in groups
    ]  # fmt: skip
    yield TextTable(("module", "targets", "layers", "found by", "confidence"), rows)


def graphs_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """Show how many targets each graph of a folder took."""
    for name, each in record.get("graphs", {}).items():
        yield f"{name}: {counted(each['targets'], 'target')}; {checked(each)}"


def checked(record: Mapping[str, Any]) -> str:
    """Show the result of the check."""
    found = record["difference"]
    return record["note"] or ("not checked" if found is None else f"largest difference {found:.2g} of the output")


def _plan_view(record: Mapping[str, Any]) -> View:
    yield f"merge into {record['base']}"
    yield from targets_view(record)
    yield f"{counted(len(record['targets']), 'target')}, {counted(_weights(record), 'weight')} to compute"


def _merged_view(record: Mapping[str, Any]) -> View:
    yield from targets_view(record)
    yield from graphs_lines(record)
    yield from damage_lines(record.get("damage", {}), record.get("beside", ()))
    yield f"wrote {record['out']}: {counted(len(record['targets']), 'target')} merged; {checked(record)}"


def _weights(record: Mapping[str, Any]) -> int:
    return len({name for target in record["targets"] for name in target["weight"]})
