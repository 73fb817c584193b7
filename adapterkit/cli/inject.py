"""Attach an adapter to an ONNX graph.

MODEL.onnx is the graph, A an adapter in any known format. The graph's own numbers stay as they are; the result is run
against the same change made another way, unless --no-check is given.
"""

from __future__ import annotations

from typing import Any

import click

from . import _options
from ._graphs import checked, targets_table
from ._render import View, show
from ._writing import refuse_place


@click.command(help=__doc__)
@click.argument("model", metavar="MODEL.onnx")
@click.argument("adapter", metavar="A")
@click.option("-o", "--out", metavar="OUT.onnx", required=True, help="File to write.")
@click.option(
    "--mode", type=click.Choice(["constant", "slots"]), default="constant", show_default=True,
    help="Write the adapter into the graph, or make its tensors inputs that may be left out.",
)  # fmt: skip
@click.option("--base-weights", metavar="DIR", help="Weights of the base: finds layers whose names are lost.")
@click.option("--check/--no-check", default=True, show_default=True, help="Run the result and compare it.")
@_options.flags
@click.pass_context
def command(
    ctx: click.Context, model: str, adapter: str, out: str, mode: str, base_weights: str | None, check: bool
) -> None:
    """Runs `adapterkit.onnx.inject`."""
    refuse_place(out)
    from ..onnx import inject

    settings: _options.Settings = ctx.obj
    report = inject(model, adapter, out, mode=mode, base_weights=base_weights, check=check)
    show(settings, report.record(), _view)


def _view(record: Any) -> View:
    return [
        targets_table(record),
        f"wrote {record['out']}: {len(record['targets'])} targets; {checked(record)}",
    ]
