"""Check that a merged base is its base and these adapters.

Every tensor of MERGED is computed again from BASE and the adapters and compared bit by bit. Name the adapters, and
their weights, in the order in which they were merged. Without a base and adapters, the files are compared with the
checksums that were taken when they were written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from . import _options
from ._graphs import warn
from ._progress import progress
from ._render import Table, View, counted, show


@click.command(help=__doc__)
@click.argument("merged")
@click.argument("more", metavar="", nargs=-1)
@click.option("--base", metavar="BASE", help="The base that was merged into.")
@click.option(
    "--adapter", "adapters", multiple=True, metavar="A",
    help="An adapter that was merged; give one --adapter each, or name the others after the first.",
)  # fmt: skip
@_options.weights
@_options.compat
@_options.allow_partial
@_options.rename
@click.option("--seed", type=int, help="The seed that the merge was rounded with.")
@click.option("--sample", type=click.IntRange(1), metavar="N", help="Only N tensors that adapters touch and N others.")
@_options.strict_base
@_options.flags
@click.pass_context
def command(
    ctx: click.Context, merged: str, more: tuple[str, ...], base: str | None, adapters: tuple[str, ...],
    weights: tuple[float, ...], allow_partial: bool, rename: tuple[str, ...], seed: int | None, sample: int | None,
    compat: str | None, strict_base: bool,
) -> None:  # fmt: skip
    """Runs `adapterkit.verify`."""
    if more and len(adapters) > 1:
        raise click.UsageError("give each adapter an --adapter of its own")
    if (base is None) != (not adapters):
        raise click.UsageError("give --base and --adapter both, or neither")
    settings: _options.Settings = ctx.obj
    chosen = list(weights) or None
    held = _options.in_reading((*adapters, *more), compat, base)
    record = record_of(settings, merged, base, held, chosen, allow_partial, seed, sample, rename, strict_base)
    warn(record.get("warnings", ()))
    show(settings, record, verdict)
    if not record["ok"]:
        ctx.exit(1)


def record_of(
    settings: _options.Settings, merged: str, base: str | None, adapters: Sequence[Any], weights: list[float] | None,
    allow_partial: bool, seed: int | None = None, sample: int | None = None, rename: Sequence[str] = (),
    strict_base: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Verifies with a progress meter; the verification as plain data."""
    from ..merging import verify

    with progress(settings, "verify") as meter:
        options = {
            "allow_partial": allow_partial, "seed": seed, "sample": sample, "rename": rename, "strict_base": strict_base
        }  # fmt: skip
        verification = verify(merged, base, adapters, weights=weights, progress=meter, **options)  # type: ignore[arg-type]
    return dict(verification.record())


def verdict(record: Mapping[str, Any]) -> View:
    """The lines for people."""
    files = record.get("files")
    kind = "file" if files else "tensor"
    checked = counted(files or record["tensors"], kind)
    if record["ok"]:
        yield f"verified: {checked} checked, all {'as written' if files else 'equal bit by bit'}"
        return
    for base in record.get("base", ()):
        yield f"not verified: {base['named_by']} names a base with the fingerprint {base['expected']}"
        yield f"              the base that was given has {base['given']}"
    if not record["differences"]:
        return
    yield f"not verified: {len(record['differences']):,} of {checked} differ"
    rows = [[d["tensor"], d["why"], d["elements"] or None, d["largest"] or None] for d in record["differences"]]
    yield Table((kind, "why", "elements", "largest"), rows)
