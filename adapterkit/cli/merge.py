"""Fold adapters into a base and write the new base.

BASE is a folder of weights or one weight file; each A an adapter in any known format; OUT a path, or a place on a hub
such as oci://registry/name:tag. An interrupted merge goes on where it stopped when the same command is run again.
BASE may be an ONNX file: OUT.onnx is then run against the graph with the adapter attached.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from . import _options
from ._combining import combination, method_and_settings, named_by, recipe_of, recipe_option
from ._graphs import damage_lines, is_graphs, merge_graph, refuse_graph_options
from ._progress import clock, progress
from ._render import TextTable, View, counted, show, size
from .verify import record_of, verdict

if TYPE_CHECKING:
    from ..merging.planned import Plan
    from ..ops.recipes import Recipe


@click.command(help=__doc__)
@click.argument("base", required=False)
@click.argument("adapters", metavar="A...", nargs=-1)
@click.option("-o", "--out", metavar="OUT", help="Folder, file or uri to write; needed unless only the plan is shown.")
@_options.weights
@method_and_settings(default=None)
@recipe_option
@click.option(
    "--device", callback=_options.device_name, default="auto", show_default=True, metavar="DEVICE",
    help="Where to compute: auto, cpu, cuda:N, or several: cuda:0,cuda:1.",
)  # fmt: skip
@click.option("--dtype", metavar="D", help="Cast all floating weights, e.g. to BF16; as in the base if absent.")
@click.option(
    "--shard-size", callback=_options.byte_count, metavar="SIZE",
    help="Largest weight file to write, e.g. 5GB; the base's own files if absent.",
)  # fmt: skip
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="What runs it.")
@click.option("--address", metavar="HOST:PORT", help="Of the Ray cluster; one on this machine if absent.")
@_options.tied
@click.option(
    "--quantized", type=click.Choice(["dequantize", "requantize", "original"]),
    help="Where the base is quantized: fold into its dequantized weights and write 16 bits; quantize them again; or "
    "fold into the weights of --onto.",
)  # fmt: skip
@click.option(
    "--keep-change", type=click.Choice(["float", "packed"]),
    help="Of a quantized graph: keep the change beside the weights as factors of floating point, or quantize it with "
    "them, however much is lost. With requantize and neither, beside where more than 5 % would be lost.",
)  # fmt: skip
@click.option(
    "--keep", type=click.Choice(["adapter"]),
    help="With requantize: shift numbers before they are rounded, so that the grid holds the adapter's change.",
)  # fmt: skip
@click.option(
    "--remainder", type=click.IntRange(min=1), metavar="RANK",
    help="With requantize: write what rounding lost as a LoRA of this rank to OUT/remainder, to run beside OUT.",
)  # fmt: skip
@click.option("--onto", metavar="DIR", help="The 16-bit weights that a quantized base was made from.")
@click.option("--seed", type=int, help="Round stochastically, drawn from this seed, instead of to the nearest.")
@click.option(
    "--memory",
    callback=_options.byte_count,
    metavar="SIZE",
    help="Most memory to hold; half of what is free if absent.",
)
@click.option("--link", is_flag=True, help="Hard links instead of copies of files that no adapter touches.")
@click.option("--checksums", is_flag=True, help="Take sums of what is written, for verify without the base.")
@click.option(
    "--tokenizer", metavar="base|adapter|DIR",
    help="Whose tokenizer and chat template go along, whole; if absent, an adapter's own where it fits the base.",
)  # fmt: skip
@_options.strict_base
@_options.strict_licence
@click.option(
    "--vocab", type=click.Choice(["grow", "keep"]),
    help="Where an adapter has more tokens than the base: add their rows, or leave them out. If absent, grow where the "
    "adapter's file holds all new rows.",
)  # fmt: skip
@click.option("--stream", is_flag=True, help="Fetch a base from a hub one weight file at a time, never all of it.")
@_options.compat
@_options.allow_partial
@_options.rename
@_options.overwrite
@click.option("--plan", "only_plan", is_flag=True, help="Show what would be written, and write nothing.")
@click.option(
    "--nodes", type=click.IntRange(min=1), metavar="N",
    help="With --plan: time, bytes and money of --engine ray on 1, 2, 4, ... N nodes that share no disk.",
)  # fmt: skip
@click.option(
    "--bandwidth", callback=_options.byte_count, metavar="SIZE",
    help="With --nodes: bytes a second between a node and the store, each way, e.g. 1.25GB for 10 Gbit/s.",
)  # fmt: skip
@click.option("--price", type=click.FloatRange(min=0), metavar="P", help="With --nodes: price of a node for an hour.")
@click.option(
    "--node-tasks", type=click.IntRange(min=1), metavar="N",
    help="With --nodes: tasks that a node runs at once; Ray starts one for each processor. 1 if absent.",
)  # fmt: skip
@click.option("--verify", "verified", is_flag=True, help="Compute every merged tensor again and compare it to OUT.")
@click.option(
    "--base-weights", metavar="DIR", help="Of a graph: weights of its base, to find layers whose names are lost."
)
@click.option("--check/--no-check", default=True, show_default=True, help="Of a graph: run the result and compare it.")
@_options.flags
@click.pass_context
def command(
    ctx: click.Context, base: str | None, adapters: tuple[Any, ...], out: str | None, weights: tuple[float, ...],
    method: str | None, parameters: tuple[str, ...], recipe: str | None, device: str, dtype: str | None,
    shard_size: int | None, engine: str, address: str | None, tied: str | None, quantized: str | None, onto: str | None,
    stream: bool,
    allow_partial: bool, rename: tuple[str, ...], overwrite: bool, only_plan: bool, verified: bool, seed: int | None,
    memory: int | None, link: bool, checksums: bool, tokenizer: str | None, strict_base: bool, base_weights: str | None,
    check: bool, compat: str | None, vocab: str | None, remainder: int | None, keep_change: str | None,
    strict_licence: bool, keep: str | None, nodes: int | None, bandwidth: int | None, price: float | None,
    node_tasks: int | None,
) -> None:  # fmt: skip
    """Runs `adapterkit.merge`, `adapterkit.merging.plan`, or what is theirs for graphs."""
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
        raise click.UsageError("Missing argument 'A...': name the adapters after the base")
    graph = is_graphs(base, out)
    if graph is not None and read_from is not None:
        raise click.UsageError("--recipe is not for an ONNX graph: combine first, and merge the result")
    if graph is not None:
        held = _options.in_reading(adapters, compat, base_weights)
        merge_graph(
            ctx, graph, held, out, weights, base_weights, quantized, keep_change, tied, strict_base, check, overwrite,
            only_plan, rename, allow_partial,
        )  # fmt: skip
        return
    refuse_graph_options(ctx, base)
    _check_nodes(only_plan, nodes, bandwidth, price, node_tasks)
    from ..merging import merge, plan

    settings: _options.CliSettings = ctx.obj
    chosen = list(weights) or None
    named = adapters
    adapters = _options.in_reading(adapters, compat, base)
    if method is not None or read_from is not None:
        # The result is in the base's names already.
        adapters, chosen, rename = _combined(base, adapters, method, weights, parameters, rename, read_from), None, ()
    elif parameters:
        raise click.UsageError("--set is of a --method")
    if only_plan:
        with _headers_of(base) as here:
            planned = plan(
                here, adapters, weights=chosen, dtype=dtype, shard_size=shard_size, tied=tied, quantized=quantized,
                onto=onto, allow_partial=allow_partial, seed=seed, memory=memory, link=link,
                tokenizer=tokenizer, strict_base=strict_base, strict_licence=strict_licence, rename=rename,
                vocab=vocab, keep=keep,
            )  # fmt: skip
            told: dict[str, Any] = {**planned.record(digests=False), "base": base}
            if nodes is not None and bandwidth is not None:
                told["cluster"] = _forecasts(planned, nodes, bandwidth, price, node_tasks or 1)
        show(settings, told, _plan_view)
        return
    if out is None:
        raise click.UsageError("Missing option '-o' / '--out'")
    if remainder is not None:
        _check_remainder(out, quantized, keep)
    with progress(settings, "merge") as meter:
        report = merge(
            base, adapters, out, weights=chosen, device=device, dtype=dtype, shard_size=shard_size, engine=engine,
            address=address, progress=meter, tied=tied, quantized=quantized, onto=onto, allow_partial=allow_partial,
            overwrite=overwrite, seed=seed, memory=memory, link=link, stream=stream,
            checksums=checksums, tokenizer=tokenizer, strict_base=strict_base, strict_licence=strict_licence,
            rename=rename, vocab=vocab, keep=keep,
        )  # fmt: skip
    record: dict[str, Any] = dict(report.record())
    if (method is not None or read_from is not None) and tokenizer is None:
        record["warnings"] = [*record["warnings"], *_tokenizers_of(named)]
    if read_from is not None:
        record["warnings"] = [*record["warnings"], *read_from.notes]
    if remainder is not None:
        record["remainder"] = _remainder(
            settings, out, base, adapters, remainder, weights=chosen, allow_partial=allow_partial, rename=rename
        )
    if verified:
        record["verification"] = record_of(
            settings, out, onto or base, adapters, chosen, allow_partial, seed, rename=rename
        )
    show(settings, record, _report_view)
    if verified and not record["verification"]["ok"]:
        ctx.exit(1)


@contextmanager
def _headers_of(base: str) -> Iterator[str]:
    """The base, of which a plan needs headers only: 1.3 TB are not downloaded to see what would be done with them."""
    from ..errors import Unsupported
    from ..io.locations import is_remote, ranged

    with ExitStack() as stack:
        here = base
        if is_remote(base):
            # Suppress: a base in another form than safetensors is downloaded, as a merge does.
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
        raise click.UsageError("--nodes requires --plan: a merge takes the nodes that the Ray cluster has")
    elif not bandwidth:
        raise click.UsageError("--nodes requires --bandwidth, the bytes a second of a node, such as --bandwidth 1.25GB")


def _forecasts(planned: Plan, most: int, bandwidth: int, price: float | None, tasks: int) -> dict[str, Any]:
    from ..merging.simulation import doubling, simulate

    rows = [simulate(planned, nodes, bandwidth=bandwidth, price=price, tasks=tasks) for nodes in doubling(most)]
    return {
        "bandwidth": bandwidth, "price": price, "tasks": tasks, "forecasts": [forecast.record() for forecast in rows],
    }  # fmt: skip


def _cluster_view(record: Mapping[str, Any]) -> View:
    cluster = record["cluster"]
    yield (
        f"simulated: --engine ray, {counted(cluster['tasks'], 'task')} at once on a node, "
        f"{size(cluster['bandwidth'])} a second each way between a node and the store"
    )
    priced = cluster["price"] is not None
    columns = ("nodes", "time", "from the store", "to the store", "link busy", "node hours")
    yield TextTable(
        (*columns, "cost") if priced else columns,
        [
            [
                row["nodes"], clock(row["seconds"]), size(row["downloaded"]), size(row["uploaded"]),
                f"{row['busy']:.0%}", f"{row['node_hours']:.2f}", *([f"{row['cost']:.2f}"] if priced else []),
            ]
            for row in cluster["forecasts"]
        ],
    )  # fmt: skip


def _check_remainder(out: str, quantized: str | None, keep: str | None) -> None:
    from ..io.locations import is_address

    if quantized != "requantize":
        raise click.UsageError("--remainder is what --quantized requantize loses: name both")
    if keep is not None:
        raise click.UsageError(
            "--remainder holds more of what rounding to the nearest loses, which is of few directions, than of what "
            "--keep leaves, which is of many: leave one of them out"
        )
    if is_address(out):
        raise click.UsageError("--remainder needs a folder as OUT: merge into a folder, and push it")


def _remainder(
    settings: _options.CliSettings, out: str, base: str, adapters: Sequence[Any], rank: int, **options: Any
) -> dict[str, Any]:
    """Write the remainder beside the merged weights; says how much of the loss it holds."""
    import math
    from pathlib import Path

    from ..merging import remainder
    from ..writing import write

    cuts: list[Any] = []
    with progress(settings, "remainder") as meter:
        lost = remainder(out, base, adapters, rank, report=cuts.append, progress=meter, **options)
    there = Path(out) / "remainder"
    write(lost, there, format="peft", overwrite=True)
    whole, left = (math.hypot(*(getattr(cut, field) for cut in cuts)) for field in ("norm", "error"))
    return {"path": str(there), "rank": rank, "targets": len(cuts), "lost": whole, "left": left}


def _combined(
    base: str, adapters: Sequence[Any], method: str | None, weights: Sequence[float], parameters: Sequence[str],
    rename: Sequence[str], recipe: Recipe | None,
) -> tuple[Any, ...]:  # fmt: skip
    """The adapters as one, to merge in their place."""
    from .. import ops

    given = {"base": base, "rename": rename or None}
    sources, options = combination(adapters, method, weights, parameters, given, recipe)
    with named_by(recipe):
        if recipe is None:
            return (ops.combine(sources, **options),)
        return (ops.combine(sources, **options, before=lambda outline: recipe.check_layers(outline.updates)),)


def _tokenizers_of(adapters: Sequence[str]) -> Iterator[str]:
    """A warning where adapters that were combined have tokenizers, of which none was taken."""
    from pathlib import Path

    from ..merging.companions import has_tokenizer

    found = [name for name in adapters if has_tokenizer(Path(name))]
    if found:
        yield f"the tokenizer of the base is kept; {', '.join(found)} have their own: --tokenizer DIR takes one"


def _plan_view(record: Mapping[str, Any]) -> View:
    yield f"merge into {record['base']}"
    yield _adapters_table(record)
    columns = ("file", "bytes", "copied", "computed", "targets")
    files = record["files"]
    yield TextTable(
        columns, [[f["name"], f["bytes"], f["copied_bytes"], f["computed_bytes"], f["targets"]] for f in files]
    )  # fmt: skip
    yield from _names(record)
    held = size(record["peak_memory"])
    yield f"{counted(record['targets'], 'target')}, {size(record['bytes'])} to write, {held} of memory at most"
    yield from _quantized(record)
    if "cluster" in record:
        yield from _cluster_view(record)
    yield from _warnings(record)


def _report_view(record: Mapping[str, Any]) -> View:
    if record.get("already_done"):
        yield f"already done: {record['out']} was made from the same inputs and is unchanged"
    targets, seconds = counted(record["targets"], "target"), f"{record['seconds']:.2f} s"
    files = counted(len(record["files"]), "file")
    yield f"{record['out']}: {targets} merged, {files} of {size(record['bytes'])} in {seconds}"
    yield _adapters_table(record)
    yield from _names(record)
    yield from _extremes(record["norms"])
    yield from _quantized(record)
    if "remainder" in record:
        held = record["remainder"]
        share, of = 1 - held["left"] ** 2 / (held["lost"] ** 2 or 1.0), counted(held["targets"], "target")
        yield f"{held['path']}: LoRA of rank {held['rank']}, {of}, {share:.0%} of what rounding lost (squared norm)"
    if record["resumed"] and not record.get("already_done"):
        yield f"{counted(len(record['resumed']), 'file')} kept from the interrupted run"
    yield from _warnings(record)
    if "verification" in record:
        yield from verdict(record["verification"])


def _quantized(record: Mapping[str, Any]) -> Iterator[str]:
    chosen = record["quantized"]
    if chosen is not None:
        weights = counted(chosen["weights"], "weight")
        yield f"{chosen['choice']}: {weights} of scheme {chosen['scheme']}: {chosen['why']}"
    yield from damage_lines(record.get("damage", {}))


def _adapters_table(record: Mapping[str, Any]) -> TextTable:
    rows = [[a["name"], float(a["weight"]), a["targets"], (a["digest"] or "")[:12]] for a in record["adapters"]]
    return TextTable(("adapter", "weight", "targets", "digest"), rows)


def _names(record: Mapping[str, Any]) -> Iterator[str]:
    """The rules by which an adapter's names became the base's, where they are not the same."""
    for adapter in record["adapters"]:
        used = "; ".join(f"{each['rule']} ({each['targets']:,})" for each in adapter.get("names", ()))
        if used:
            yield f"names of {adapter['name']}: {used}"


def _extremes(norms: Mapping[str, Sequence[float]]) -> Iterator[str]:
    """The smallest and the largest change: an adapter that does nothing, or far too much, shows here."""
    if norms:
        low, high = (choose(norms, key=lambda name: max(norms[name])) for choose in (min, max))
        yield f"norm of a change: {max(norms[low]):.4g} ({low}) to {max(norms[high]):.4g} ({high})"


def _warnings(record: Mapping[str, Any]) -> Iterator[str]:
    for adapter in record["adapters"]:
        if adapter["missing"]:
            names = ", ".join(adapter["missing"])
            yield f"warning: {adapter['name']}: not in the base, left out: {names}"
    yield from (f"warning: {warning}" for warning in record["warnings"])
    if record.get("left_out"):
        yield f"warning: files of the base, left out: {', '.join(record['left_out'])}"
