"""Find the combination of adapters with the lowest loss on texts.

Each A is an adapter in any known format. A trial combines the adapters, attaches the result to the base in memory and
measures the loss. Trials are recorded in RECIPE.trials. To resume an interrupted search, run the same command again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import _options
from ._render import TextTable, View, counted
from ._writing import is_done, made_from, refuse_place, show_written

if TYPE_CHECKING:
    from ..searching.result import Search

SHOWN = 8
"""The maximum number of trials in the printed table, which starts with the best trial."""


def bounds(text: str) -> tuple[str, tuple[float, float]]:
    """Parse a value of `--tune`, such as `scale=0.2:2`, into a parameter's name and its bounds.

    Raises:
        UsageError: the text does not have the form NAME=LOW:HIGH.
    """
    from ..errors import UsageError

    name, _, pair = text.partition("=")
    try:
        low, high = map(float, pair.split(":"))
    except ValueError:
        why = f"{text!r} does not have the form NAME=LOW:HIGH"
        raise UsageError(why, where="--tune", cure="Type, for example, --tune scale=0.2:2") from None
    return name, (low, high)


@click.command(help=__doc__)
@click.argument("adapters", metavar="A...", nargs=-1, required=True)
@click.option("--data", metavar="FILE", required=True, help="Texts, one per line, or JSON Lines with a 'text' field.")
@click.option("--base", metavar="BASE", required=True, help="Base model: the folder of a transformers language model.")
@_options.strict_base_of_read
@click.option("--budget", type=click.IntRange(1), default=50, show_default=True, metavar="N", help="Number of trials.")
@click.option(
    "--method", "methods", multiple=True, metavar="METHOD",
    help="Combining method to try. Repeatable; default: linear, ties, tsv, knots_ties and the methods of --start.",
)  # fmt: skip
@click.option(
    "--start", multiple=True, metavar="RECIPE|METHOD",
    help="Combination to try first: a recipe of these adapters, or a method (all weights are then 1). Repeatable.",
)  # fmt: skip
@click.option("--most", type=float, default=1.5, show_default=True, metavar="W", help="Largest weight to try.")
@click.option(
    "--tune", multiple=True, metavar="NAME=LOW:HIGH",
    help="Range in which to search a parameter of the methods. density is always searched. Repeatable.",
)  # fmt: skip
@click.option("--rank", type=int, metavar="R", help="Rank of the results; default: the largest rank of the adapters.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Random seed of the search.")
@click.option(
    "--device", metavar="D", default="auto", show_default=True, help="Device to compute on: auto, cpu or cuda:N."
)
@click.option(
    "-o",
    "--out",
    metavar="RECIPE",
    required=True,
    help="Recipe to write, for the --recipe option of combine and merge.",
)
@_options.overwrite
@_options.flags
@click.pass_obj
def command(
    settings: _options.CliSettings, adapters: tuple[str, ...], data: str, base: str, budget: int,
    methods: tuple[str, ...], start: tuple[str, ...], most: float, tune: tuple[str, ...], rank: int | None, seed: int,
    device: str, out: str, overwrite: bool,
) -> None:  # fmt: skip
    """Run `adapterkit.search`."""
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
    _options.in_reading(adapters, None, base)  # --strict-base is enforced here.
    result = search(
        list(adapters), data, base=base, methods=methods or None, budget=budget, tune=dict(map(bounds, tune)),
        start=start, most=most, rank="fit" if rank is None else rank, seed=seed, trials=kept, overwrite=overwrite,
        device=device,
    )  # fmt: skip
    with staged(Path(out), overwrite=overwrite, made_from=digest) as path:
        path.write_text(result.recipe(), "utf-8")
    warned = _options.base_warnings(adapters, adapters, base)
    record = result.record() | {"out": out, "trials_file": str(kept), "warnings": warned}
    show_written(settings, record, lambda _: _view(result, out, str(kept), warned), digest)


def _view(result: Search, out: str, trials_file: str, warnings: Sequence[str]) -> View:
    from ..searching.result import shown_parameters

    ranked = sorted((trial.loss, trial.number) for trial in result.trials if trial.loss is not None)
    by_number = {trial.number: trial for trial in result.trials}
    rows = [
        [
            number, by_number[number].method, " ".join(f"{weight:.3g}" for weight in by_number[number].weights),
            shown_parameters(by_number[number].parameters, 3), f"{loss:.5g}",
        ]
        for loss, number in ranked[:SHOWN]
    ]  # fmt: skip
    yield TextTable(("trial", "method", "weights", "parameters", "loss"), rows)
    for adapter, alone in zip(result.adapters, result.alone, strict=True):
        yield f"{adapter} alone: {'loss not measured' if alone is None else f'loss {alone:.5g}'}"
    left = len(result.trials) - len(ranked)
    yield f"{counted(len(result.trials), 'trial')}, {left} of them failed" if left else counted(len(ranked), "trial")
    yield from (f"warning: {warning}" for warning in warnings)
    yield f"{out}: the recipe of the best trial; {trials_file}: all trials"
