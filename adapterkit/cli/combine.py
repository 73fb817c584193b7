"""Make one adapter of several.

Each A is an adapter in any known format; `adapterkit list combine` shows the methods and their parameters. A recipe is
a YAML file that says the same, close to mergekit's: merge_method, models with their parameters, parameters, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from . import _options, _writing
from ._combining import combination, method_and_settings
from ._render import Table, View, show


@click.command(help=__doc__)
@click.argument("adapters", metavar="A...", nargs=-1)
@method_and_settings(default="linear")
@_options.weights
@click.option("--recipe", metavar="FILE", help="Read adapters, method, weights and parameters from a YAML file.")
@click.option("--rank", type=int, metavar="R", help="Cut the result to a rank, target by target.")
@click.option("--seed", type=int, default=None, metavar="N", help="Of what a method draws at random; 0 if absent.")
@click.option("--disjoint", is_flag=True, help="Adapters that share no target are meant to.")
@_writing.dtype
@_options.base
@click.option("--compat", metavar="NAME", help="Methods, names and choices of another tool: mergekit or peft.")
@_options.rename
@_options.stating
@_writing.writing
@_options.flags
@click.pass_obj
def command(
    settings: _options.Settings, adapters: tuple[str, ...], method: str | None, parameters: tuple[str, ...],
    weights: tuple[float, ...], recipe: str | None, rank: int | None, seed: int | None, disjoint: bool,
    dtype: str | None, base: str | None, compat: str | None, out: str, target_format: str | None, on_loss: str,
    overwrite: bool, rename: tuple[str, ...],
) -> None:  # fmt: skip
    """Runs `adapterkit.ops.combine`."""
    from .. import detect, ops

    given = {
        "rank": rank, "seed": seed, "disjoint": disjoint or None, "dtype": dtype, "base": base, "compat": compat,
        "rename": rename or None,
    }  # fmt: skip
    sources, options = combination(adapters, method, weights, parameters, given, recipe)
    target_format = target_format or _format_of(sources, detect)
    destination = _writing.Destination(
        out, sources, overwrite, target_format=target_format, base=options.get("base"),
        inputs=[] if recipe is None else [recipe],
    )  # fmt: skip
    if destination.is_done(settings):
        return
    made = ops.combine(_options.in_reading(sources, None, options.get("base")), **options)
    record = destination.write(made, on_loss)
    show(settings, record | said(made), _view)


def said(made: Any) -> dict[str, Any]:
    """What the lineage says of a combination: the method and what it was told."""
    args = made.recipe[-1].args
    return {key: args.get(key) for key in ("method", "parameters", "weights", "seed", "rank", "compat")}


def _format_of(sources: Sequence[str], detect: Any) -> str:
    """The sources' format, where they have one in common."""
    found = {detect(source) for source in sources}
    return found.pop() if len(found) == 1 else "adapterkit"


def _view(record: Mapping[str, Any]) -> View:
    yield f"{record['method']}, weights {' '.join(map(str, record['weights']))}"
    if record["parameters"]:
        yield Table(("parameter", "value"), [[name, str(value)] for name, value in record["parameters"].items()])
    yield from _writing.outcome(record)
