"""The `merge` command for ONNX graphs, and the text that all commands print about graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import _render
from ._options import CliSettings
from ._render import TextTable, View, counted, integer, number, part, part_or_none, parts, remark, show, texts
from ._writing import is_done, made_from, refuse_place, show_written

if TYPE_CHECKING:
    from ..core.adapter import Adapter

MOST_SHOWN = 8
"""Quantization errors are printed for at most this many targets; --json shows all targets."""


def damage_lines(record: Mapping[str, object]) -> Iterator[str]:
    """Yield lines about the quantization errors of a merge into quantized weights.

    The first lines are about the targets whose weights were quantized again: one line per target, worst first. If there
    are more than `MOST_SHOWN` such targets, one line summarizes the rest. The last line counts the changes that were
    kept as floating-point factors.

    Args:
        record: the record of a merge. `damage` maps each target to a record with two numbers: `error` is the
            quantization error relative to the merged weight, and `kept` is the fraction of the change that is left
            after quantization. `beside` lists the targets whose quantized weight was left unchanged; their changes were
            kept as floating-point factors. If the merge first tried to quantize such a target's merged weight, `damage`
            has the numbers of that attempt.
    """
    every, beside = part_or_none(record, "damage") or {}, texts(record, "beside")
    damage = {name: part(every, name) for name in every}
    rounded = {name: error for name, error in damage.items() if name not in beside}
    worst = sorted(rounded, key=lambda name: number(rounded[name], "kept"))
    for name in worst[:MOST_SHOWN]:
        error, kept = number(rounded[name], "error"), number(rounded[name], "kept")
        yield f"{name}: error {error:.3%}, {kept:.1%} of the change kept"
    if worst[MOST_SHOWN:]:
        kept = number(rounded[worst[len(worst) // 2]], "kept")
        yield f"and {counted(len(worst) - MOST_SHOWN, 'target')} more; the median target keeps {kept:.1%} of its change"
    if beside:
        tried = [number(damage[name], "kept") for name in beside if name in damage]
        why = f": quantizing again would keep only {min(tried):.1%} to {max(tried):.1%} of a change" if tried else ""
        yield f"{counted(len(beside), 'change')} kept next to the quantized weight, as floating-point factors{why}"


ONLY_FOLDERS = {
    "method": "Combine the adapters first with adapterkit combine, then merge the result",
    "dtype": "Export the model with adapterkit export --dtype, then merge into the exported graph",
    "device": "Omit the option: graphs are merged on the CPU",
    "shard_size": "Omit the option: the weights of a graph are written to one file",
    "engine": "Omit the option: graphs are merged on this machine",
    "address": "Omit the option: graphs are merged on this machine",
    "nodes": "Omit the option: graphs are merged on this machine",
    "bandwidth": "Omit the option: graphs are merged on this machine",
    "price": "Omit the option: graphs are merged on this machine",
    "node_tasks": "Omit the option: graphs are merged on this machine",
    "onto": "Export the 16-bit weights, then merge into the exported graph",
    "seed": "Omit the option: merged weights of a graph are rounded to the nearest value",
    "memory": "Omit the option: graphs are always merged in small blocks",
    "link": "Omit the option: the weights of a graph are always copied",
    "stream": "Download the graph first with adapterkit pull",
    "parameters": "--set requires --method; combine the adapters first with adapterkit combine",
    "checksums": "Omit the option: checksums are not recorded for graphs",
    "tokenizer": "Copy the tokenizer next to the graph",
    "verified": "Omit the option: a merged graph is always run and compared, except with --no-check",
    "consumer": "Merge into a GGUF model instead: Ollama does not run graphs",
    "calibration": "Merge into the folder of weights, then export the result: a graph's weights are rounded to nearest",
    "keep": "Merge into the folder of weights, then export the result: a graph's weights are rounded to nearest",
    "remainder": "Merge into the folder of weights, then export the result: graphs have no remainder",
    "strict_licence": "Omit the option, because graphs have no model card; adapterkit inspect shows the licences of "
    "base and adapters",
}  # fmt: skip
"""Parameters of `merge` that are refused for an ONNX graph -> the cure in the error."""

ONLY_GRAPHS = ("base_weights", "keep_change", "check")
"""Parameters of `merge` that are accepted only for ONNX graphs."""


def graph_in(base: str) -> str | None:
    """Return the path of an ONNX file: `base` itself, or the only ONNX file in the folder `base`.

    Return None for anything else, such as a folder that also has weights.
    """
    from ..reporting.inspecting import graph_file

    return graph_file(base)


def graph_or_folder(model: str, out: str | None) -> str:
    """Return the path of the single ONNX file at `model`, or `model` itself.

    If `model` is a folder of graphs and `out` is a path that does not end in .onnx, the command changes all graphs of
    the folder. In this case, return `model` itself. Also return `model` itself if there is no single ONNX file at
    `model` (see `graph_in`).
    """
    from ..reporting.inspecting import graph_folder

    if out is not None and not out.lower().endswith(".onnx") and graph_folder(model) is not None:
        return model
    return graph_in(model) or model


def is_graphs(base: str, out: str | None) -> str | None:
    """Return the path of an ONNX file or of a folder of ONNX files; None if `base` is neither.

    A folder that also has weights does not count as a folder of ONNX files. If `base` is a folder with a single ONNX
    file, `out` decides whether the path of the folder or of the file is returned; see `graph_or_folder`.
    """
    from ..reporting.inspecting import graph_folder

    graph = graph_or_folder(base, out)
    return graph if graph.lower().endswith(".onnx") or graph_folder(graph) is not None else None


def given(ctx: click.Context, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (parameter, option) for each parameter in `names` that was typed on the command line."""
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            yield parameter.name or "", parameter.opts[0]


def merge_graph(
    ctx: click.Context, model: str, adapters: Sequence[Adapter | str], out: str | None, weights: Sequence[float],
    base_weights: str | None, quantized: str | None, keep_change: str | None, tied: str | None, strict_base: bool,
    check: bool, overwrite: bool, only_plan: bool, rename: Sequence[str], allow_partial: bool,
) -> None:  # fmt: skip
    """Merge adapters into a graph with `adapterkit.onnx.merge`.

    With `only_plan`, merge nothing, and print the result of `adapterkit.onnx.plan`.
    """
    from ..errors import UsageError

    for name, option in given(ctx, tuple(ONLY_FOLDERS)):
        raise UsageError(f"{option} is not for an ONNX graph", path=model, cure=ONLY_FOLDERS[name])
    if quantized == "original":
        raise UsageError("--quantized original is not for an ONNX graph", path=model, cure=ONLY_FOLDERS["onto"])
    settings: CliSettings = ctx.obj
    chosen = list(weights) or None
    if only_plan:
        from ..onnx import plan

        plan_lines = plan(
            model, adapters, weights=chosen, base_weights=base_weights, tied=tied, strict_base=strict_base,
            rename=rename, allow_partial=allow_partial,
        )  # fmt: skip
        show(settings, {"base": model, "targets": [place.record() for place in plan_lines]}, _plan_view)
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
    show_written(settings, report.record(), _merged_view, decided)


def decided_by(model: str, sources: Sequence[str | None]) -> tuple[str, list[Path]]:
    """Return a digest of the inputs and options of a merge or an injection, and the list of the input files.

    `made_from` computes the digest.

    Args:
        model: the graph, or the folder of graphs.
        sources: the paths of the adapters and of the base's weights; None entries are ignored.
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
        # config.json affects the result, because it states whether the output head and the embedding share a weight.
        files += [file for file in beside if file.is_file()]
    files += [file for path in sources if path is not None for file in files_read(located(path))]
    return made_from(files, ("onnx", "onnx-ir", "numpy")), files


def free(out: str, overwrite: bool, read: Sequence[Path]) -> None:
    """Remove files that a killed run left behind, and refuse an output path that must not be replaced.

    Refuse `out` if it is also an input, or if it exists and `overwrite` is not set. An empty folder is accepted.
    """
    from ..io.staging import check_free, check_inputs, take_over

    take_over(Path(out))
    check_inputs([Path(out)], read)
    check_free(Path(out), overwrite)


def refuse_graph_options(ctx: click.Context, base: str) -> None:
    """Raise an error if the user typed an option of `merge` that is only for ONNX graphs.

    Raises:
        UsageError: such an option was typed.
    """
    refuse(ctx, ONLY_GRAPHS, "is only for ONNX graphs", base, "Pass an .onnx file as BASE, or omit the option")


def refuse(
    ctx: click.Context, names: Sequence[str], why: str, path: str | None = None, cure: str = "Omit the option"
) -> None:
    """Raise an error if the user typed one of the given options.

    Args:
        ctx: the context of the command.
        names: the parameter names of the options to refuse, such as `base_weights` for `--base-weights`.
        why: the text after the option's name in the error message, such as `is only for ONNX graphs`.
        path: the path that the error shows.
        cure: the cure in the error.

    Raises:
        UsageError: one of the options was typed.
    """
    from ..errors import UsageError

    for _, option in given(ctx, names):
        raise UsageError(f"{option} {why}", path=path, cure=cure)


def warn(warnings: Sequence[str]) -> None:
    """Print the warnings of a report on standard error. With `--json`, the JSON on standard output also has them."""
    for line in warnings:
        remark(f"warning: {line}")


def targets_view(record: Mapping[str, object], every: bool = False) -> View:
    """Yield a table of the targets that were found in a graph.

    The table has a row for each target. If there are many targets, targets that differ only in the layer
    share one row.

    Args:
        record: the record of a merge, an injection or a plan.
        every: whether to print a row for each target even if there are many.
    """
    targets = _render.in_order(parts(record, "targets"))
    if every or len(targets) <= _render.FEW:
        rows = [
            [t["target"], ", ".join(texts(t, "nodes")), t["method"], f"{number(t, 'confidence'):.2f}"] for t in targets
        ]  # fmt: skip
        columns: tuple[str, ...] = ("target", "node", "found by", "confidence")
        if "graphs" in record:
            columns, rows = ("graph", *columns), [[t["graph"], *row] for t, row in zip(targets, rows, strict=True)]
        yield TextTable(columns, rows)
        return
    groups = _render.by_module(targets)
    rows = [
        [
            module, len(group), _render.layers_of(group, layers),
            ", ".join(dict.fromkeys(str(t["method"]) for t in group)),
            _render.span([f"{number(t, 'confidence'):.2f}" for t in group]),
        ]
        for module, group, layers in groups
    ]  # fmt: skip
    yield TextTable(("module", "targets", "layers", "found by", "confidence"), rows)


def graphs_lines(record: Mapping[str, object]) -> Iterator[str]:
    """Yield a line for each graph of a folder, with the number of the graph's targets and the result of its check."""
    graphs = part_or_none(record, "graphs") or {}
    for name in graphs:
        each = part(graphs, name)
        yield f"{name}: {counted(integer(each, 'targets'), 'target')}; {checked(each)}"


def checked(record: Mapping[str, object]) -> str:
    """Return the result of a graph's check as text: the largest difference and the check's note, or `not checked`."""
    parts = []
    if record["difference"] is not None:
        parts.append(f"largest difference {number(record, 'difference'):.2g}, relative to the output")
    if record["note"]:
        parts.append(str(record["note"]))
    return "; ".join(parts) or "not checked"


def _plan_view(record: Mapping[str, object]) -> View:
    yield f"merge into {record['base']}"
    yield from targets_view(record)
    targets = parts(record, "targets")
    weights = {name for target in targets for name in texts(target, "weight")}
    yield f"{counted(len(targets), 'target')}, {counted(len(weights), 'weight')} to compute"


def _merged_view(record: Mapping[str, object]) -> View:
    yield from targets_view(record)
    yield from graphs_lines(record)
    yield from damage_lines(record)
    yield f"wrote {record['out']}: {counted(len(parts(record, 'targets')), 'target')} merged; {checked(record)}"
