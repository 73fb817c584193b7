"""Tell whether two adapters are the same function.

A and B may be of different formats and methods. The exit code is 0 where they change a base alike, 1 where they do not,
and 3 where only a base could tell and none was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from . import _options
from ._render import TextTable, View, counted, show

COLUMNS = {
    "target": "target", "equal": "equal", "relative error": "relative_error", "norm A": "norm_a", "norm B": "norm_b",
    "rank A": "effective_rank_a", "rank B": "effective_rank_b", "cosine": "cosine", "overlap out": "overlap_out",
    "overlap in": "overlap_in", "sign conflict": "sign_conflict", "interference": "interference",
}  # fmt: skip

SPARE = (
    "overlap in", "overlap out", "interference", "sign conflict", "rank A", "rank B", "norm A", "norm B", "cosine",
)  # fmt: skip
"""Columns that a narrow terminal may leave out, the first one first."""


@click.command(help=__doc__)
@click.argument("a")
@click.argument("b")
@_options.base
@_options.strict_base_of_read
@_options.compat
@click.option(
    "--tolerance", type=float, default=1e-6, show_default=True, metavar="E",
    help="Relative error up to which changes are the same.",
)  # fmt: skip
@click.option("--signs/--no-signs", default=True, help="Compare single elements, which takes longer; on if absent.")
@_options.rename
@_options.flags
@click.pass_context
def command(
    ctx: click.Context, a: str, b: str, base: str | None, tolerance: float, signs: bool, compat: str | None,
    rename: tuple[str, ...],
) -> None:  # fmt: skip
    """Runs `adapterkit.ops.compare`."""
    from .. import ops

    read = _options.in_reading((a, b), compat, base)
    found = ops.compare(*read, base=base, tolerance=tolerance, signs=signs, rename=rename)
    warnings = _options.base_warnings((a, b), read, base)
    show(ctx.obj, {"a": a, "b": b, **found.record(), "warnings": warnings}, _view)
    if found.equal is not True:
        ctx.exit(1 if found.equal is False else 3)


def _short(value: Any) -> Any:
    """A number with four digits that count: more of them only make the table wide."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _view(record: Mapping[str, Any]) -> View:
    targets = record["targets"]
    yield TextTable(tuple(COLUMNS), [[_short(target[name]) for name in COLUMNS.values()] for target in targets], SPARE)
    same = sum(target["equal"] is True for target in targets)
    bits = sum(target["bits"] for target in targets)
    verdict = {True: "the same function", False: "not the same function", None: "only a base could tell: pass --base"}
    yield f"{verdict[record['equal']]}: {same:,} of {counted(len(targets), 'target')} equal, {bits:,} bit by bit"
    if record["relative_error"] is not None:
        cosine = "" if record["cosine"] is None else f", cosine {record['cosine']:.4g}"
        yield f"relative error of all together: {record['relative_error']:.4g}{cosine}"
    yield from (f"warning: {warning}" for warning in record["warnings"])
