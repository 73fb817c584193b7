"""Merge adapters into a base and write the merged model.

BASE is a folder of weights or one weight file; each A is an adapter in any known format; OUT is a path, or an address
on a hub such as oci://registry/name:tag. Run an interrupted merge again to resume it. BASE may also be an ONNX model.
In this case, the merged graph is run, and its outputs are compared with the outputs of BASE with the adapters attached.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from . import _options
from ._graphs import damage_lines, is_graphs, merge_graph, refuse_graph_options
from ._options import combination, learned_data, method_and_settings, named_by, recipe_of, recipe_option
from ._progress import clock, progress
from ._render import TextTable, View, counted, integer, number, part, part_or_none, parts, show, size, texts
from .verify import record_of, verdict

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..io.strict_json import JsonValue
    from ..merging.planned import Plan
    from ..ops import Cut
    from ..ops.recipes import Recipe


@click.command(help=__doc__)
@click.argument("base", required=False)
@click.argument("adapters", metavar="A...", nargs=-1)
@click.option("-o", "--out", metavar="OUT", help="Folder, file or hub URI to write. Required, except with --plan.")
@_options.weights
@method_and_settings(default=None)
@recipe_option
@click.option(
    "--device", callback=_options.device_name, default="auto", show_default=True, metavar="DEVICE",
    help="Device to compute on: auto, cpu, cuda:N, or several such as cuda:0,cuda:1.",
)  # fmt: skip
@click.option("--dtype", metavar="D", help="Cast all floating-point weights to this dtype, e.g. BF16.")
@click.option(
    "--shard-size", callback=_options.byte_count, metavar="SIZE",
    help="Maximum size of a weight file, e.g. 5GB. Default: the same files as the base.",
)  # fmt: skip
@click.option(
    "--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
    help="Run on this machine, or on a Ray cluster.",
)  # fmt: skip
@click.option(
    "--address", metavar="HOST:PORT", help="Address of the Ray cluster. Default: start a cluster on this machine."
)
@_options.tied
@click.option(
    "--quantized", type=click.Choice(["dequantize", "requantize", "original"]),
    help="How to merge into a quantized base. dequantize: merge into the dequantized weights and write 16-bit weights; "
    "requantize: quantize the merged weights again; original: merge into the original 16-bit weights at --onto.",
)  # fmt: skip
@click.option(
    "--keep-change", type=click.Choice(["float", "packed"]),
    help="For a quantized graph: how to store the adapters' changes. float: keep the quantized weights and attach the "
    "changes as floating-point factors; packed (only with --quantized requantize): add each change to its weight and "
    "quantize the sum, even if much of the change is lost. Default for --quantized requantize: float for each weight "
    "that would lose more than 5 % of its change, packed for the others.",
)  # fmt: skip
@click.option(
    "--keep", type=click.Choice(["adapter"]),
    help="With --quantized requantize: adjust the merged weights before rounding, so that the quantized weights keep "
    "more of the adapter's change.",
)  # fmt: skip
@click.option(
    "--calibration", metavar="TEXTS",
    help="With --keep: round so that the error is small for the activations of these texts. TEXTS is builtin, a text "
    "file with one text per line, a JSON Lines file, or a .safetensors file of activations. The activations are "
    "written to OUT.calibration.safetensors.",
)  # fmt: skip
@click.option(
    "--remainder", type=click.IntRange(min=1), metavar="RANK",
    help="With --quantized requantize: write a LoRA of this rank to OUT/remainder. Loaded together with OUT, it "
    "corrects a part of the rounding error.",
)  # fmt: skip
@click.option(
    "--for", "consumer", type=click.Choice(["ollama"]),
    help="Write a Modelfile next to OUT, for `ollama create`. Ollama does not load adapters, only merged models.",
)  # fmt: skip
@click.option("--onto", metavar="DIR", help="Original 16-bit weights of a quantized base.")
@click.option("--seed", type=int, help="Round stochastically with this random seed, instead of to the nearest value.")
@click.option(
    "--memory", callback=_options.byte_count, metavar="SIZE",
    help="Maximum memory to use; default: half of the free memory.",
)  # fmt: skip
@click.option("--link", is_flag=True, help="Hard-link files that no adapter changes, instead of copying them.")
@click.option(
    "--checksums", is_flag=True, help="Record checksums of the output, so that verify works without the base."
)
@click.option(
    "--tokenizer", metavar="base|adapter|DIR",
    help="Source of the tokenizer and chat template. Default: the tokenizer of an adapter, if this tokenizer is "
    "complete and fits the base; otherwise the tokenizer of the base.",
)  # fmt: skip
@_options.strict_base
@_options.strict_licence
@click.option(
    "--vocab", type=click.Choice(["grow", "keep"]),
    help="How to merge an adapter that has more tokens than the base. grow: add the new embedding rows; keep: omit "
    "these rows. Default: grow if the adapter's file contains all new rows, otherwise an error.",
)  # fmt: skip
@click.option(
    "--stream", is_flag=True,
    help="Download the base's weight files one at a time, and delete each file after use.",
)  # fmt: skip
@_options.compat
@_options.allow_partial
@_options.rename
@_options.overwrite
@click.option("--plan", "only_plan", is_flag=True, help="Show what would be written, but write nothing.")
@click.option(
    "--nodes", type=click.IntRange(min=1), metavar="N",
    help="With --plan: simulate --engine ray on 1, 2, 4, ... N nodes without a shared disk; show time, bytes and cost.",
)  # fmt: skip
@click.option(
    "--bandwidth", callback=_options.byte_count, metavar="SIZE",
    help="With --nodes: speed of a node's network link in bytes per second, in each direction, e.g. 1.25GB for "
    "10 Gbit/s.",
)  # fmt: skip
@click.option("--price", type=click.FloatRange(min=0), metavar="P", help="With --nodes: price of one node per hour.")
@click.option(
    "--node-tasks", type=click.IntRange(min=1), metavar="N",
    help="With --nodes: number of tasks that a simulated node runs at once. Default: 1. A real Ray node runs one task "
    "per CPU.",
)  # fmt: skip
@click.option(
    "--verify",
    "verified",
    is_flag=True,
    help="After the merge, compute every merged tensor again, and compare it with OUT.",
)
@click.option(
    "--base-weights", metavar="DIR",
    help="For a graph: folder with the weights of its base. With them, layers are also found if the graph has lost the "
    "layers' names.",
)  # fmt: skip
@click.option(
    "--check/--no-check", default=True, show_default=True, help="For a graph: run the result and check its outputs."
)
@_options.flags
@click.pass_context
def command(
    ctx: click.Context, base: str | None, adapters: tuple[str, ...], out: str | None, weights: tuple[float, ...],
    method: str | None, parameters: tuple[str, ...], data: tuple[str, ...], recipe: str | None, device: str,
    dtype: str | None, shard_size: int | None, engine: str, address: str | None, tied: str | None,
    quantized: str | None, onto: str | None, stream: bool,
    allow_partial: bool, rename: tuple[str, ...], overwrite: bool, only_plan: bool, verified: bool, seed: int | None,
    memory: int | None, link: bool, checksums: bool, tokenizer: str | None, strict_base: bool, base_weights: str | None,
    check: bool, compat: str | None, vocab: str | None, remainder: int | None, keep_change: str | None,
    strict_licence: bool, keep: str | None, calibration: str | None, consumer: str | None, nodes: int | None,
    bandwidth: int | None, price: float | None, node_tasks: int | None,
) -> None:  # fmt: skip
    """Run `adapterkit.merge` or `adapterkit.merging.plan`, or their counterparts for graphs."""
    read_from: Recipe | None = None
    if recipe is not None:
        _, read_from = recipe_of(adapters, recipe)
        assert read_from is not None
        base = base or read_from.options.get("base")
        tokenizer = tokenizer or read_from.tokenizer
    if base is None:
        cure = " (or base_model in the recipe)" if recipe is not None else ""
        raise click.UsageError(f"Missing argument 'BASE'{cure}")
    if not adapters and read_from is None:
        raise click.UsageError("Missing argument 'A...': type the adapters after the base")
    graph = is_graphs(base, out)
    if graph is not None and read_from is not None:
        raise click.UsageError(
            "--recipe does not work with an ONNX graph: run 'adapterkit combine --recipe' first, then merge its result"
        )
    if graph is not None:
        loaded = _options.in_reading(adapters, compat, base_weights)
        merge_graph(
            ctx, graph, loaded, out, weights, base_weights, quantized, keep_change, tied, strict_base, check, overwrite,
            only_plan, rename, allow_partial,
        )  # fmt: skip
        return
    refuse_graph_options(ctx, base)
    _check_nodes(only_plan, nodes, bandwidth, price, node_tasks)
    from ..io.locations import is_address, is_remote
    from ..merging import merge, plan
    from ..merging.companions import write_modelfile

    settings: _options.CliSettings = ctx.obj
    chosen = list(weights) or None
    read = _options.in_reading(adapters, compat, base)
    if method is not None or read_from is not None:
        # Pass no rename rules: the combined adapter already has the names of the base.
        read, chosen, rename = _combined(base, read, method, weights, parameters, data, rename, read_from), None, ()
    elif parameters:
        raise click.UsageError("--set requires --method")
    elif data:
        raise click.UsageError("--data requires --method or --recipe")
    if calibration is not None and (keep is None or quantized not in (None, "requantize")):
        raise click.UsageError("--calibration requires --quantized requantize --keep adapter")
    if only_plan:
        with _headers_of(base) as here:
            planned = plan(
                here, read, weights=chosen, dtype=dtype, shard_size=shard_size, tied=tied, quantized=quantized,
                onto=onto, allow_partial=allow_partial, seed=seed, memory=memory, link=link,
                tokenizer=tokenizer, strict_base=strict_base, strict_licence=strict_licence, rename=rename,
                vocab=vocab, keep=keep, calibration=_given_file(calibration),
            )  # fmt: skip
            forecast: dict[str, JsonValue] = {**planned.record(digests=False), "base": base}
            if calibration is not None and _given_file(calibration) is None:
                forecast["warnings"] = _with_texts(calibration, planned)
            if nodes is not None and bandwidth is not None:
                forecast["cluster"] = _simulated(planned, nodes, bandwidth, price, node_tasks or 1)
        show(settings, forecast, _plan_view)
        return
    if out is None:
        raise click.UsageError("Missing option '-o' / '--out'")
    if remainder is not None:
        _check_remainder(out, quantized, keep)
    if consumer is not None and is_address(out):
        raise click.UsageError("--for ollama requires a local path as OUT: merge into a file or a folder")
    activations = None
    if calibration is not None:
        if _given_file(calibration) is None and not is_remote(base):
            # Plan first, so that errors of the merge appear before the model runs on the texts.
            plan(
                base, read, weights=chosen, dtype=dtype, shard_size=shard_size, tied=tied, quantized=quantized,
                allow_partial=allow_partial, seed=seed, memory=memory, link=link, rename=rename, vocab=vocab,
                tokenizer=tokenizer, strict_base=strict_base, strict_licence=strict_licence, keep=keep,
            )  # fmt: skip
        activations = _activations(
            settings,
            calibration,
            out,
            base,
            read,
            weights=chosen,
            device=device,
            tied=tied,
            rename=rename,
            overwrite=overwrite,
            allow_partial=allow_partial,
        )
    with progress(settings, "merge") as meter:
        report = merge(
            base, read, out, weights=chosen, device=device, dtype=dtype, shard_size=shard_size, engine=engine,
            address=address, progress=meter, tied=tied, quantized=quantized, onto=onto, allow_partial=allow_partial,
            overwrite=overwrite, seed=seed, memory=memory, link=link, stream=stream,
            checksums=checksums, tokenizer=tokenizer, strict_base=strict_base, strict_licence=strict_licence,
            rename=rename, vocab=vocab, keep=keep, calibration=activations,
        )  # fmt: skip
    record: dict[str, Any] = dict(report.record())
    if (method is not None or read_from is not None) and tokenizer is None:
        record["warnings"] = [*record["warnings"], *_tokenizers_of(adapters)]
    if read_from is not None:
        record["warnings"] = [*record["warnings"], *read_from.notes]
    if consumer is not None:
        record["modelfile"] = str(write_modelfile(out, overwrite=overwrite))
    if activations is not None:
        record["calibration"] = activations
    if remainder is not None:
        record["remainder"] = _remainder(
            settings, out, base, read, remainder, weights=chosen, allow_partial=allow_partial, rename=rename
        )
    if verified:
        record["verification"] = record_of(
            settings, out, onto or base, read, chosen, allow_partial, seed, rename=rename, calibration=activations
        )
    show(settings, record, _report_view)
    if verified and not record["verification"]["ok"]:
        ctx.exit(1)


def _with_texts(calibration: str, planned: Plan) -> list[JsonValue]:
    """Read the texts of --calibration to check them, and return the plan's warnings.

    The warning that asks for a calibration file is left out, because the merge computes this file from the texts.

    Raises:
        UsageError, Malformed, StorageError: the texts cannot be read.
    """
    from ..gating.models import texts_of
    from ..merging.requantize import TEXTS

    texts_of(calibration)
    return [warning for warning in planned.warnings if warning != TEXTS]


def _given_file(calibration: str | None) -> str | None:
    """Return the calibration file that --calibration names; None if the option names texts."""
    return calibration if calibration is not None and calibration.endswith(".safetensors") else None


def _activations(
    settings: _options.CliSettings, calibration: str, out: str, base: str, adapters: Sequence[Adapter | str], *,
    weights: Sequence[float] | None, device: str, tied: str | None, rename: tuple[str, ...], overwrite: bool,
    allow_partial: bool,
) -> str:  # fmt: skip
    """Return the path of the calibration file. If --calibration names texts, compute the file from the texts first."""
    from ..io.locations import is_address

    given = _given_file(calibration)
    if given is not None:
        return given
    if is_address(out):
        raise click.UsageError("--calibration TEXTS requires a local path as OUT: merge into a folder, then push it")
    from ..gating import calibrate

    there = f"{out.rstrip('/')}.calibration.safetensors"
    with progress(settings, "calibration", sizes=False) as meter:
        calibrate(
            base, adapters, there, data=calibration, weights=weights, device=device.partition(",")[0], tied=tied,
            rename=rename, overwrite=overwrite, allow_partial=allow_partial, progress=meter,
        )  # fmt: skip
    return there


@contextmanager
def _headers_of(base: str) -> Iterator[str]:
    """Yield the path or address of the base for `plan`.

    For a safetensors base on a hub, download only the headers and the small files, and yield their local path.
    """
    from ..errors import Unsupported
    from ..io.locations import is_remote, ranged

    with ExitStack() as stack:
        here = base
        if is_remote(base):
            # If the base is not in safetensors, leave its address unchanged: `plan` then downloads the whole base.
            with suppress(Unsupported):
                here = str(stack.enter_context(ranged(base, whole=True)).path)
        yield here


def _check_nodes(
    only_plan: bool, nodes: int | None, bandwidth: int | None, price: float | None, node_tasks: int | None
) -> None:
    if nodes is None:
        given = {"--bandwidth": bandwidth, "--price": price, "--node-tasks": node_tasks}
        first = next((name for name, value in given.items() if value is not None), None)
        if first is not None:
            raise click.UsageError(f"{first} requires --nodes")
    elif not only_plan:
        raise click.UsageError(
            "--nodes only simulates a merge, and requires --plan; a real merge uses all nodes of the Ray cluster"
        )
    elif not bandwidth:
        raise click.UsageError("--nodes requires --bandwidth, the bytes per second of a node, e.g. --bandwidth 1.25GB")


def _simulated(planned: Plan, most: int, bandwidth: int, price: float | None, tasks: int) -> dict[str, JsonValue]:
    from ..merging.cluster import doubling, simulate

    rows = [simulate(planned, nodes, bandwidth=bandwidth, price=price, tasks=tasks) for nodes in doubling(most)]
    return {
        "bandwidth": bandwidth, "price": price, "tasks": tasks, "forecasts": [forecast.record() for forecast in rows],
    }  # fmt: skip


def _cluster_view(cluster: Mapping[str, object]) -> View:
    yield (
        f"simulated: --engine ray, {counted(integer(cluster, 'tasks'), 'task')} at once on a node, "
        f"{size(integer(cluster, 'bandwidth'))} per second in each direction between a node and the store"
    )
    priced = cluster["price"] is not None
    columns = ("nodes", "time", "from the store", "to the store", "link busy", "node hours")
    yield TextTable(
        (*columns, "cost") if priced else columns,
        [
            [
                row["nodes"], clock(number(row, "seconds")), size(integer(row, "downloaded")),
                size(integer(row, "uploaded")), f"{number(row, 'busy'):.0%}", f"{number(row, 'node_hours'):.2f}",
                *([f"{number(row, 'cost'):.2f}"] if priced else []),
            ]
            for row in parts(cluster, "forecasts")
        ],
    )  # fmt: skip


def _check_remainder(out: str, quantized: str | None, keep: str | None) -> None:
    from ..io.locations import is_address

    if quantized != "requantize":
        raise click.UsageError("--remainder requires --quantized requantize")
    if keep is not None:
        raise click.UsageError(
            "--remainder and --keep do not work together: the error that --keep leaves has no low-rank structure, so a "
            "LoRA cannot store it. Omit one of the two options"
        )
    if is_address(out):
        raise click.UsageError("--remainder requires a folder as OUT: merge into a folder, then push it")


def _remainder(
    settings: _options.CliSettings, out: str, base: str, adapters: Sequence[Adapter | str], rank: int, *,
    weights: Sequence[float] | None, allow_partial: bool, rename: Sequence[str],
) -> dict[str, JsonValue]:  # fmt: skip
    """Write the LoRA of --remainder to OUT/remainder.

    Return a record with the LoRA's path and rank, and the norms of the rounding error without and with the LoRA.
    """
    import math
    from pathlib import Path

    from ..merging import remainder
    from ..writing import write

    cuts: list[Cut] = []
    with progress(settings, "remainder") as meter:
        lost = remainder(
            out, base, adapters, rank, report=cuts.append, progress=meter, weights=weights,
            allow_partial=allow_partial, rename=rename,
        )  # fmt: skip
    there = Path(out) / "remainder"
    write(lost, there, format="peft", overwrite=True)
    whole, left = (math.hypot(*(getattr(cut, field) for cut in cuts)) for field in ("norm", "error"))
    return {"path": str(there), "rank": rank, "targets": len(cuts), "lost": whole, "left": left}


def _combined(
    base: str, adapters: Sequence[Adapter | str], method: str | None, weights: Sequence[float],
    parameters: Sequence[str], data: Sequence[str], rename: Sequence[str], recipe: Recipe | None,
) -> tuple[Adapter, ...]:  # fmt: skip
    """Combine the adapters into one adapter, and return a tuple with only this adapter."""
    from .. import ops

    given = {"base": base, "rename": rename or None}
    sources, options = combination(adapters, method, weights, parameters, given, recipe)
    with named_by(recipe):
        options |= learned_data(data, sources, options)
        if recipe is None:
            return (ops.combine(sources, **options),)
        return (ops.combine(sources, **options, before=lambda outline: recipe.check_layers(outline.updates)),)


def _tokenizers_of(adapters: Sequence[str]) -> Iterator[str]:
    """Yield a warning if combined adapters have tokenizers, because the merged model gets the tokenizer of the base."""
    from pathlib import Path

    from ..merging.companions import has_tokenizer

    with_tokenizer = [name for name in adapters if has_tokenizer(Path(name))]
    if with_tokenizer:
        names = ", ".join(with_tokenizer)
        yield (
            f"the tokenizer of the base is kept, although these adapters have a tokenizer too: {names}; "
            "--tokenizer DIR (tokenizer=) chooses another tokenizer"
        )


def _plan_view(record: Mapping[str, object]) -> View:
    yield f"merge into {record['base']}"
    yield _adapters_table(record)
    columns = ("file", "bytes", "copied", "computed", "targets")
    files = parts(record, "files")
    yield TextTable(
        columns, [[f["name"], f["bytes"], f["copied_bytes"], f["computed_bytes"], f["targets"]] for f in files]
    )  # fmt: skip
    yield from _names(record)
    memory, written = size(integer(record, "peak_memory")), size(integer(record, "bytes"))
    yield f"{counted(integer(record, 'targets'), 'target')}, {written} to write, {memory} of memory at most"
    yield from _quantized(record)
    if "cluster" in record:
        yield from _cluster_view(part(record, "cluster"))
    yield from _warnings(record)


def _report_view(record: Mapping[str, object]) -> View:
    if record.get("already_done"):
        yield f"already done: {record['out']} was made from the same inputs and is unchanged"
    targets, seconds = counted(integer(record, "targets"), "target"), f"{number(record, 'seconds'):.2f} s"
    files = counted(len(parts(record, "files")), "file")
    yield f"{record['out']}: {targets} merged, {files} of {size(integer(record, 'bytes'))} in {seconds}"
    yield _adapters_table(record)
    yield from _names(record)
    yield from _extremes(part(record, "norms"))
    yield from _quantized(record)
    if "modelfile" in record:
        yield f"{record['modelfile']}: run ollama create NAME -f {record['modelfile']}"
    if "calibration" in record:
        yield f"{record['calibration']}: activations for rounding; pass this file to adapterkit verify --calibration"
    if "remainder" in record:
        yield _remainder_line(part(record, "remainder"))
    if (resumed := texts(record, "resumed")) and not record.get("already_done"):
        yield f"{counted(len(resumed), 'file')} kept from the interrupted run"
    yield from _warnings(record)
    if "verification" in record:
        yield from verdict(part(record, "verification"))


def _remainder_line(record: Mapping[str, object]) -> str:
    lost, left = number(record, "lost"), number(record, "left")
    share, targets = 1 - left**2 / (lost**2 or 1.0), counted(integer(record, "targets"), "target")
    kept = f"{targets}, corrects {share:.0%} of the rounding error (squared norm)"
    return f"{record['path']}: LoRA of rank {record['rank']}, {kept}"


def _quantized(record: Mapping[str, object]) -> Iterator[str]:
    chosen = part_or_none(record, "quantized")
    if chosen is not None:
        weights = counted(integer(chosen, "weights"), "weight")
        yield f"{chosen['choice']}: {weights} of scheme {chosen['scheme']}: {chosen['why']}"
    yield from damage_lines(record)


def _adapters_table(record: Mapping[str, object]) -> TextTable:
    rows = [
        [each["name"], number(each, "weight") * 1.0, each["targets"], str(each["digest"] or "")[:12]]
        for each in parts(record, "adapters")
    ]
    return TextTable(("adapter", "weight", "targets", "digest"), rows)


def _names(record: Mapping[str, object]) -> Iterator[str]:
    """For each adapter, yield a line with the rules that translated the adapter's names to the names of the base."""
    for adapter in parts(record, "adapters"):
        used = "; ".join(f"{each['rule']} ({integer(each, 'targets'):,})" for each in parts(adapter, "names"))
        if used:
            yield f"names of {adapter['name']} were translated by {used}"


def _extremes(norms: Mapping[str, object]) -> Iterator[str]:
    """Yield a line with the smallest and the largest norm of the targets' changes.

    These norms reveal adapters that do nothing, and adapters that change the base too much.
    """
    if norms:
        sizes = {name: max(map(float, texts(norms, name))) for name in norms}
        low, high = (choose(sizes, key=lambda name: sizes[name]) for choose in (min, max))
        yield f"norms of the changes: {sizes[low]:.4g} ({low}) to {sizes[high]:.4g} ({high})"


def _warnings(record: Mapping[str, object]) -> Iterator[str]:
    for adapter in parts(record, "adapters"):
        if adapter["missing"]:
            names = ", ".join(texts(adapter, "missing"))
            yield f"warning: {adapter['name']}: skipped these targets, which the base does not have: {names}"
    yield from (f"warning: {warning}" for warning in texts(record, "warnings"))
    if record.get("left_out"):
        yield f"warning: files of the base that were not copied: {', '.join(texts(record, 'left_out'))}"
