"""Merge adapters into a small model and measure its accuracy.

The model, the adapters and the test images are part of the package; no network is used.
"""

from __future__ import annotations

from collections.abc import Mapping

import click

from . import _options
from ._progress import progress
from ._render import TextTable, View, number, parts, show


@click.command(help=__doc__)
@_options.flags
@click.pass_context
def command(ctx: click.Context) -> None:
    """Run `adapterkit.demo.run`."""
    from ..demo import run

    settings: _options.CliSettings = ctx.obj
    with progress(settings, "demo") as meter:
        record = run(progress=meter)
    show(settings, record, _view)
    if not all(row["verified"] for row in record["rows"]):
        ctx.exit(1)


def _view(record: Mapping[str, object]) -> View:
    right = f"{number(record, 'plain'):.1%}"
    yield f"{record['images']} handwritten digits, not used in training; the base classifies {right} of them correctly"
    columns = ("task", "method", "accuracy before", "accuracy merged", "verified", "seconds")
    rows = [
        [row["task"], row["method"], f"{number(row, 'before'):.1%}", f"{number(row, 'after'):.1%}", row["verified"],
         round(number(row, "seconds"), 2)]
        for row in parts(record, "rows")
    ]  # fmt: skip
    yield TextTable(columns, rows)
