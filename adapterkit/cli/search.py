"""Find what combines adapters best, by the loss on texts.

Each A is an adapter in any known format. Every trial combines them in factor space and scores the result attached to
the base; nothing is merged on disk. Trials are kept beside the recipe: the same command goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from . import _options
from ._render import TextTable, View, counted, show
from ._writing import is_done, made_from, refuse_place

SHOWN = 8
"""Trials in the table, the best ones."""


def bounds(text: str) -> tuple[str, tuple[float, float]]:
    """`scale=0.2:2` as a name and two numbers.

    Raises:
        UsageError: it is not NAME=LOW:HIGH.
    """
    from ..errors import UsageError

    name, _, pair = text.partition("=")
    try:
        low, high = map(float, pair.split(":"))
    except ValueError:
        why = f"{text!r} is not NAME=LOW:HIGH"
        raise UsageError(why, where="--tune", cure="Such as --tune scale=0.2:2") from None
    return name, (low, high)


@click.command(help=__doc__)
@click.argument("adapters", metavar="A...", nargs=-1, required=True)
@click.option("--data", metavar="FILE", required=True, help="Texts: one a line, or JSON Lines with a field text.")
@click.option("--base", metavar="BASE", required=True, help="The base, a folder of a transformers language model.")
@_options.strict_base_of_read
@click.option("--budget", type=click.IntRange(1), default=50, show_default=True, metavar="N", help="Trials to make.")
@click.option(
    "--method", "methods", multiple=True, metavar="METHOD",
    help="A method to choose from; repeatable. If absent: linear, ties, tsv, knots_ties and those of --start.",
)  # fmt: skip
@click.option(
    "--start", multiple=True, metavar="RECIPE|METHOD",
    help="A combination to try first: a recipe of these adapters, or a method at weight 1; repeatable.",
)  # fmt: skip
@click.option("--most", type=float, default=1.5, show_default=True, metavar="W", help="Largest weight to try.")
@click.option(
    "--tune", multiple=True, metavar="NAME=LOW:HIGH",
    help="A parameter of the methods to search; density is searched where a method has it.",
)  # fmt: skip
@click.option("--rank", type=int, metavar="R", help="Rank of results; if absent, the largest of the inputs.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the search.")
@click.option("--device", metavar="D", default="auto", show_default=True, help="auto, cpu or cuda:N.")
@click.option("-o", "--out", metavar="RECIPE", required=True, help="Recipe to write, for combine and merge --recipe.")
@_options.overwrite
@_options.flags
@click.pass_obj
def command(
    settings: _options.CliSettings, adapters: tuple[str, ...], data: str, base: str, budget: int,
    methods: tuple[str, ...], start: tuple[str, ...], most: float, tune: tuple[str, ...], rank: int | None, seed: int,
    device: str, out: str, overwrite: bool,
) -> None:  # fmt: skip
    """Runs `adapterkit.search`."""
    from .. import search
    from ..formats import files_read
    from ..io.locations import local, located
    from ..io.staging import check_free, check_inputs, staged

    refuse_place(out)
    kept = Path(f"{out}.trials")
    files = [file for source in (*adapters, base) for file in files_read(located(source))] + [located(data)]
    files += [path for path in map(local, start) if path.is_file()]
    digest = made_from(files, ("optuna",))
    if is_done(settings, out, digest, overwrite):
        return
    check_free(Path(out), overwrite)
    check_inputs([Path(out), kept], files)
    _options.in_reading(adapters, None, base)  # With --strict-base this refuses another base.
    found = search(
        list(adapters), data, base=base, methods=methods or None, budget=budget, tune=dict(map(bounds, tune)),
        start=start, most=most, rank="fit" if rank is None else rank, seed=seed, trials=kept, overwrite=overwrite,
        device=device,
    )  # fmt: skip
    with staged(Path(out), overwrite=overwrite, made_from=digest) as path:
        path.write_text(found.recipe(), "utf-8")
    warned = _options.base_warnings(adapters, adapters, base)
    show(settings, found.record() | {"out": out, "trials_file": str(kept), "warnings": warned}, _view)


def _view(record: Mapping[str, Any]) -> View:
    from ..searching.result import shown_parameters

    ranked = sorted((trial for trial in record["trials"] if trial["loss"] is not None), key=lambda trial: trial["loss"])
    rows = [
        [
            trial["number"], trial["method"], " ".join(f"{weight:.3g}" for weight in trial["weights"]),
            shown_parameters(trial["parameters"], 3), f"{trial['loss']:.5g}",
        ]
        for trial in ranked[:SHOWN]
    ]  # fmt: skip
    yield TextTable(("trial", "method", "weights", "parameters", "loss"), rows)
    for name, loss in zip(record["adapters"], record["alone"], strict=True):
        yield f"{name} alone: {'no loss' if loss is None else f'{loss:.5g}'}"
    left = len(record["trials"]) - len(ranked)
    yield f"{counted(len(record['trials']), 'trial')}, {left} without a loss" if left else counted(len(ranked), "trial")
    yield from (f"warning: {warning}" for warning in record["warnings"])
    yield f"{record['out']}: the recipe of the best; {record['trials_file']}: all trials"
