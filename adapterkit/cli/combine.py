"""Make one adapter of several.

Each A is an adapter in any known format; `adapterkit list combine` shows the methods and their parameters. A recipe is
a YAML file that says the same, close to mergekit's: merge_method, models with their parameters, parameters, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from . import _options, _writing
from ._combining import combination, method_and_settings, named_by, recipe_of, recipe_option
from ._progress import progress
from ._render import TextTable, View, counted, show


@click.command(help=__doc__)
@click.argument("adapters", metavar="A...", nargs=-1)
@method_and_settings(default="linear")
@_options.weights
@recipe_option
@click.option(
    "--rank", type=int, metavar="R",
    help="Cut the result to a rank, target by target. If absent, a result that has no low-rank factors is cut to the "
              "largest rank of the inputs, where the format has no dense update.",
)  # fmt: skip
@click.option("--seed", type=int, default=None, metavar="N", help="Of what a method draws at random; 0 if absent.")
@click.option("--disjoint", is_flag=True, help="Adapters that share no target are meant to.")
@_writing.dtype
@_options.base
@_options.strict_base_of_read
@click.option("--compat", metavar="NAME", help="Methods, names and choices of another tool: mergekit or peft.")
@_options.rename
@_options.stating
@_writing.writing
@_options.flags
@click.pass_obj
def command(
    settings: _options.CliSettings, adapters: tuple[str, ...], method: str | None, parameters: tuple[str, ...],
    weights: tuple[float, ...], recipe: str | None, rank: int | None, seed: int | None, disjoint: bool,
    dtype: str | None, base: str | None, compat: str | None, out: str, target_format: str | None, on_loss: str,
    overwrite: bool, rename: tuple[str, ...],
) -> None:  # fmt: skip
    """Runs `adapterkit.ops.combine`."""
    from .. import detect, ops
    from ..errors import Unrepresentable

    given = {
        "rank": rank, "seed": seed, "disjoint": disjoint or None, "dtype": dtype, "base": base, "compat": compat,
        "rename": rename or None,
    }  # fmt: skip
    named, read_from = recipe_of(adapters, recipe)
    if read_from is not None and recipe is None:
        recipe = adapters[0]
    sources, options = combination(named, method, weights, parameters, given, read_from)
    with named_by(read_from):
        target_format = target_format or _format_of(sources, detect)
    destination = _writing.CommandDestination(
        out, sources, overwrite, target_format=target_format, base=options.get("base"),
        inputs=[] if recipe is None else [recipe],
    )  # fmt: skip
    if destination.is_done(settings):
        return
    read = _options.in_reading(sources, None, options.get("base"))
    cuts: list[ops.Cut] = []

    def refuse_early(outline: Any) -> None:
        if read_from is not None:
            read_from.check_layers(outline.updates)
        what = f"{target_format} cannot hold what {options.get('method', 'linear')} makes"
        _check_writable(outline, target_format, options.get("base"), on_loss, what)

    with named_by(read_from), progress(settings, "combine") as meter:
        working: dict[str, Any] = {"report": cuts.append, "before": refuse_early, "progress": meter}
        try:
            made = ops.combine(read, **options, **working)
        except Unrepresentable:
            if options.get("rank") is not None:
                raise
            made = ops.combine(read, **options | {"rank": "fit"}, **working)
    record = destination.write(made, on_loss)
    record |= {"cuts": [cut.record() for cut in cuts], "relative_error": _error(cuts)}
    told = [] if read_from is None else [*read_from.notes]
    if read_from is not None and read_from.tokenizer is not None:
        told.append("the recipe's tokenizer is not used: adapters have none; 'adapterkit merge --recipe' takes it")
    record["warnings"] = [
        *told,
        *made.recipe[-1].args.get("warnings", ()),
        *_options.base_warnings(sources, read, options.get("base")),
    ]
    show(settings, record | said(made), _view)


def _check_writable(outline: Any, name: str, base: Any, on_loss: str, what: str) -> None:
    from tempfile import TemporaryDirectory

    from ..formats import FORMATS
    from ..ops.outline import check_writable
    from ..writing import write

    with TemporaryDirectory() as folder:
        place = Path(folder) / (FORMATS[name].file or "adapter")
        check_writable(outline, lambda adapter: write(adapter, place, name, base, on_loss), what)


def _error(cuts: Sequence[Any]) -> float | None:
    """The error of all cuts together, relative to what was cut."""
    whole = math.hypot(*(cut.norm for cut in cuts))
    return math.hypot(*(cut.error for cut in cuts)) / whole if whole else None


def said(made: Any) -> dict[str, Any]:
    """Return the method of a combination and its parameters, as the lineage records them."""
    args = made.recipe[-1].args
    return {key: args.get(key) for key in ("method", "parameters", "weights", "each", "seed", "rank", "compat")}


def _format_of(sources: Sequence[str], detect: Any) -> str:
    """The sources' format, where they have one in common."""
    found = {detect(source) for source in sources}
    return found.pop() if len(found) == 1 else "adapterkit"


def _used(name: str, record: Mapping[str, Any]) -> str:
    """The value of a parameter; where adapters have their own, those in the adapters' order."""
    shared, own = record["parameters"][name], record["each"] or []
    if not any(name in each for each in own):
        return str(shared)
    return ", ".join(str(each.get(name, shared)) for each in own)


def _view(record: Mapping[str, Any]) -> View:
    yield f"{record['method']}, weights {' '.join(map(str, record['weights']))}"
    if record["parameters"]:
        yield TextTable(("parameter", "value"), [[name, _used(name, record)] for name in record["parameters"]])
    yield from _writing.outcome(record)
    if record["cuts"]:
        worst = max(record["cuts"], key=lambda cut: cut["relative_error"])
        ranks = sorted({cut["rank"] for cut in record["cuts"]})
        said_ranks = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        yield (
            f"cut to rank {said_ranks} at {counted(len(record['cuts']), 'target')}: relative error of all together "
            f"{record['relative_error'] or 0.0:.4g}, at most {worst['relative_error']:.4g} at {worst['target']}; "
            "a higher --rank keeps more, --to adapterkit keeps all"
        )
