"""Compare two adapters.

A and B may have different formats and methods. The exit code is 0 if both change a base in the same way, 1 if they
change it differently, and 3 if the answer depends on the base and --base is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import click

from . import _options, _render
from ._render import (
    FEW,
    HINT,
    TextTable,
    View,
    by_module,
    counted,
    in_order,
    integer,
    largest,
    number,
    parts,
    short,
    show,
    texts,
    together,
)

COLUMNS = {
    "target": "target", "equal": "equal", "relative error": "relative_error", "norm A": "norm_a", "norm B": "norm_b",
    "rank A": "effective_rank_a", "rank B": "effective_rank_b", "cosine": "cosine", "overlap out": "overlap_out",
    "overlap in": "overlap_in", "sign conflict": "sign_conflict", "interference": "interference",
}  # fmt: skip

SPARE = (
    "overlap in", "overlap out", "interference", "sign conflict", "rank A", "rank B", "norm A", "norm B", "cosine",
)  # fmt: skip
"""Columns that are dropped on a narrow terminal, in the order in which they are dropped."""

MODULES = ("module", "targets", "equal", "largest error", "in layer", "least cosine", "norm A", "norm B")


@click.command(help=__doc__)
@click.argument("a")
@click.argument("b")
@_options.base
@_options.strict_base_of_read
@_options.compat
@click.option(
    "--tolerance", type=float, default=1e-6, show_default=True, metavar="E",
    help="Maximum relative error at which two changes count as the same.",
)  # fmt: skip
@click.option(
    "--signs/--no-signs", default=True, show_default=True,
    help="Also compare the signs of the changes' elements, which takes longer.",
)  # fmt: skip
@_render.every
@_options.rename
@_options.flags
@click.pass_context
def command(
    ctx: click.Context, a: str, b: str, base: str | None, tolerance: float, signs: bool, compat: str | None,
    every: bool, rename: tuple[str, ...],
) -> None:  # fmt: skip
    """Run `adapterkit.ops.compare`."""
    from .. import ops

    read = _options.in_reading((a, b), compat, base)
    comparison = ops.compare(*read, base=base, tolerance=tolerance, signs=signs, rename=rename)
    warnings = _options.base_warnings((a, b), read, base)
    show(ctx.obj, {"a": a, "b": b, **comparison.record(), "warnings": warnings}, partial(_view, every=every))
    if comparison.equal is not True:
        ctx.exit(1 if comparison.equal is False else 3)


def _view(record: Mapping[str, object], every: bool) -> View:
    targets = in_order(parts(record, "targets"))
    if every or len(targets) <= FEW:
        rows = [[short(target[name]) for name in COLUMNS.values()] for target in targets]
        yield TextTable(tuple(COLUMNS), rows, SPARE)
    else:
        yield TextTable(MODULES, _module_rows(targets), ("least cosine", "norm A", "norm B"))
    same = sum(target["equal"] is True for target in targets)
    bits = sum(integer(target, "bits") for target in targets)
    verdict = {True: "the same change", False: "not the same change", None: "undecided without --base BASE"}
    equal = record["equal"]
    assert equal is None or isinstance(equal, bool)
    yield f"{verdict[equal]}: {same:,} of {counted(len(targets), 'target')} equal, {bits:,} bit by bit"
    if record["relative_error"] is not None:
        cosine = "" if record["cosine"] is None else f", cosine {number(record, 'cosine'):.4g}"
        yield f"relative error over all targets: {number(record, 'relative_error'):.4g}{cosine}"
    most = largest(targets, "relative_error")
    if most is not None and len(targets) > 1:
        yield f"largest difference: {most['target']}, relative error {number(most, 'relative_error'):.4g}"
    yield from (f"warning: {warning}" for warning in texts(record, "warnings"))
    if len(targets) > FEW and not every:
        yield HINT


def _module_rows(targets: Sequence[Mapping[str, object]]) -> list[list[object]]:
    """Return one row for each module: counts, the largest error and its layer, the smallest cosine, and total norms."""
    rows: list[list[object]] = []
    for module, group, layers in by_module(targets):
        most = largest(group, "relative_error")
        cosines = [number(each, "cosine") for each in group if each["cosine"] is not None]
        rows.append([
            module, len(group), sum(each["equal"] is True for each in group),
            None if most is None else short(most["relative_error"]), most and layers[str(most["target"])],
            short(min(cosines)) if cosines else None, together(group, "norm_a"), together(group, "norm_b"),
        ])  # fmt: skip
    return rows
