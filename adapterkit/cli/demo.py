"""Merge adapters into a small model and measure its accuracy.

The model, the adapters and the test images are part of the package; no network is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from . import _options
from ._progress import progress
from ._render import TextTable, View, show


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


def _view(record: Mapping[str, Any]) -> View:
    yield f"{record['images']} handwritten digits not used in training; the base reads {record['plain']:.1%} of them"
    columns = ("task", "method", "accuracy before", "accuracy merged", "verified", "seconds")
    yield TextTable(columns, [_row(row) for row in record["rows"]])


def _row(row: Mapping[str, Any]) -> list[object]:
    return [
        row["task"], row["method"], f"{row['before']:.1%}", f"{row['after']:.1%}", row["verified"],
        round(row["seconds"], 2),
    ]  # fmt: skip
