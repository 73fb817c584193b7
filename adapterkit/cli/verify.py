"""Check that a merged base is its base and these adapters.

Every tensor of MERGED is computed again from BASE and the adapters and compared bit by bit. Name the adapters, and
their weights, in the order in which they were merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from . import _options
from ._progress import progress
from ._render import Table, View, counted, show


@click.command(help=__doc__)
@click.argument("merged")
@click.argument("more", metavar="", nargs=-1)
@click.option("--base", required=True, metavar="BASE", help="The base that was merged into.")
@click.option(
    "--adapter", "adapters", required=True, multiple=True, metavar="A",
    help="An adapter that was merged; give one --adapter each, or name the others after the first.",
)  # fmt: skip
@_options.weights
@_options.allow_partial
@click.option("--seed", type=int, help="The seed that the merge was rounded with.")
@_options.flags
@click.pass_context
def command(
    ctx: click.Context, merged: str, more: tuple[str, ...], base: str, adapters: tuple[str, ...],
    weights: tuple[float, ...], allow_partial: bool, seed: int | None,
) -> None:  # fmt: skip
    """Runs `adapterkit.verify`."""
    if more and len(adapters) > 1:
        raise click.UsageError("give each adapter an --adapter of its own")
    settings: _options.Settings = ctx.obj
    record = record_of(settings, merged, base, (*adapters, *more), list(weights) or None, allow_partial, seed)
    show(settings, record, verdict)
    if not record["ok"]:
        ctx.exit(1)


def record_of(
    settings: _options.Settings, merged: str, base: str, adapters: Sequence[str], weights: list[float] | None,
    allow_partial: bool, seed: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Verifies with a progress meter; the verification as plain data."""
    from ..merging import verify

    with progress(settings, "verify") as meter:
        options = {"allow_partial": allow_partial, "seed": seed}
        verification = verify(merged, base, adapters, weights=weights, progress=meter, **options)  # type: ignore[arg-type]
    return dict(verification.record())


def verdict(record: Mapping[str, Any]) -> View:
    """The lines for people."""
    checked = counted(record["tensors"], "tensor")
    if record["ok"]:
        yield f"verified: {checked} checked, all equal bit by bit"
        return
    yield f"not verified: {len(record['differences']):,} of {checked} differ"
    rows = [[d["tensor"], d["why"], d["elements"] or None, d["largest"] or None] for d in record["differences"]]
    yield Table(("tensor", "why", "elements", "largest"), rows)
